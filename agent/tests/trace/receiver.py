"""An OTLP receiver over gRPC and HTTP: prints its ports, then a line per request."""

import http.server
import threading
from concurrent import futures

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as stubs


def say(protocol, request):
    spans = [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
    root = next(span for span in spans if not span.parent_span_id)
    digest = next(one.value.string_value for one in root.attributes if one.key == "oci.manifest.digest")
    print(f"{protocol}: {', '.join(sorted(span.name for span in spans))}; {digest}", flush=True)


class Grpc(stubs.TraceServiceServicer):
    def Export(self, request, context):
        say("grpc", request)
        return service.ExportTraceServiceResponse()


class Http(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
        request = service.ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        say("http", request)
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = grpc.server(futures.ThreadPoolExecutor(2))
stubs.add_TraceServiceServicer_to_server(Grpc(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Http)
print(port, web.server_address[1], flush=True)
threading.Thread(target=web.serve_forever, daemon=True).start()
server.wait_for_termination(timeout=600)
