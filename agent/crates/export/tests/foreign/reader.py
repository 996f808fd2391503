"""Reads what was exported with others' programs, and says what it found there. Fails if anything is not as the format has it."""

import json
import sys
from collections import defaultdict

import duckdb
from google.protobuf.unknown_fields import UnknownFieldSet
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as perfetto

directory = sys.argv[1]


def rows(reader):
    return duckdb.sql(
        f"select start, record, kind, time_ns, duration_ns, level, lane, layer, path, length, errno, whole from {reader}"
        " order by all"
    ).fetchall()


def tables():
    parquet = f"'{directory}/start.parquet'"
    all_rows = rows(parquet)
    starts = duckdb.sql(f"select count(distinct start) from {parquet}").fetchall()[0][0]
    reads, waited = duckdb.sql(
        f"select count(*), max(duration_ns) from {parquet} where record = 'read' and level = 'registry' and path = '/usr/lib/libc.so'"
    ).fetchall()[0]
    print(f"parquet: {len(all_rows)} rows, {starts} starts, {reads} reads of /usr/lib/libc.so from the registry, {waited} ns")
    csv = rows(f"read_csv('{directory}/start.csv', nullstr='', all_varchar=false)")
    # An empty text and no text are the same in CSV.
    plain = [tuple(value if value != "" else None for value in row) for row in all_rows]
    assert sorted(map(str, csv)) == sorted(map(str, plain)), (csv, plain)
    print(f"csv: {len(csv)} rows, same as parquet")
    lines = rows(f"read_json('{directory}/start.jsonl', format='newline_delimited')")
    assert list(map(str, lines)) == list(map(str, all_rows)), (lines, all_rows)
    print(f"jsonl: {len(lines)} rows, same as parquet")


def chrome():
    events = json.load(open(f"{directory}/start.json"))["traceEvents"]
    kinds = defaultdict(list)
    for event in events:
        kinds[event["ph"]].append(event)
    begun = {(event["cat"], event["id"], event["pid"]): event for event in kinds["b"]}
    for event in kinds["e"]:
        begin = begun.pop((event["cat"], event["id"], event["pid"]))
        assert event["ts"] >= begin["ts"] and event["name"] == begin["name"], event
    assert not begun, "slices that never end"
    named = {(event["pid"], event.get("tid")) for event in kinds["M"]}
    assert all((event["pid"], event["tid"]) in named for kind in "bXi" for event in kinds[kind]), "a track without a name"
    print(
        f"chrome: {len(kinds['b'])} asynchronous slices, {len(kinds['X'])} slices of threads, {len(kinds['i'])} instants"
    )


def slices_of_perfetto():
    trace = perfetto.Trace()
    trace.ParseFromString(open(f"{directory}/start.pftrace", "rb").read())
    tracks, open_slices, slices, counted = {}, defaultdict(list), 0, 0
    assert trace.packet[0].sequence_flags & perfetto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    for packet in trace.packet:
        assert not len(UnknownFieldSet(packet)), packet
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert descriptor.uuid not in tracks
            assert not descriptor.HasField("parent_uuid") or descriptor.parent_uuid in tracks, descriptor
            tracks[descriptor.uuid] = descriptor
    events = [packet for packet in trace.packet if packet.HasField("track_event")]
    # As the trace processor does: by time, and as they stand in the file.
    for packet in sorted(events, key=lambda packet: packet.timestamp):
        event = packet.track_event
        assert event.track_uuid in tracks, event
        stack = open_slices[event.track_uuid]
        if event.type == perfetto.TrackEvent.TYPE_SLICE_BEGIN:
            assert not stack, f"{event.name} overlaps {stack}"
            stack.append(event.name)
            slices += 1
        elif event.type == perfetto.TrackEvent.TYPE_SLICE_END:
            stack.pop()
        elif event.type == perfetto.TrackEvent.TYPE_COUNTER:
            assert tracks[event.track_uuid].counter.unit_name == "bytes/s"
            counted += event.counter_value
    assert not any(open_slices.values()), "slices that never end"
    assert counted >= 3_000_000, counted
    print(
        f"perfetto: {slices} slices, no track with an overlap, counters sum to 3000000 bytes a second and more"
    )


def spans_of_otlp():
    request = ExportTraceServiceRequest()
    request.ParseFromString(open(f"{directory}/start.otlp", "rb").read())
    resource = {one.key: one.value for one in request.resource_spans[0].resource.attributes}
    assert resource["service.name"].string_value == "sluice"
    spans = {span.span_id: span for span in request.resource_spans[0].scope_spans[0].spans}
    children = defaultdict(list)
    for span in spans.values():
        assert len(span.trace_id) == 16 and len(span.span_id) == 8
        assert span.end_time_unix_nano >= span.start_time_unix_nano > 1_600_000_000_000_000_000
        assert not span.parent_span_id or span.parent_span_id in spans
        children[span.parent_span_id].append(span)
    (root,) = children[b""]
    attributes = {one.key: one.value for one in root.attributes}
    assert attributes["container.image.name"].string_value == "registry.example:5000/team/app"
    assert attributes["container.image.tags"].array_value.values[0].string_value == "1.2"
    assert attributes["oci.manifest.digest"].string_value.startswith("sha256:1212")
    assert root.events[0].attributes[0].value.string_value == "renameat2"
    names = lambda of: sorted(span.name for span in children[of.span_id])
    pull = next(span for span in children[root.span_id] if span.name == "pull")
    assert names(root) == ["first byte", "profile", "pull", "ready"], names(root)
    print(f"otlp: {root.name} > first byte, profile, pull > {', '.join(names(pull))}; ready")


tables()
chrome()
slices_of_perfetto()
spans_of_otlp()
