// Runs Perfetto's trace processor, as its UI does, on /trace: a worker with the UI's engine, spoken to in the messages of
// protos/perfetto/trace_processor/trace_processor.proto. Gives the answers to the queries in `QUERIES`.
(async () => {
  const worker = new Worker("/ENGINE/engine_bundle.js");
  const channel = new MessageChannel();
  const answers = [];
  let woken = () => {};
  const hear = (answer) => { answers.push(answer); woken(); };
  channel.port2.onmessage = (event) => hear(new TextDecoder().decode(event.data));
  worker.onerror = (event) => hear("error: " + event.message);
  worker.postMessage(channel.port1, [channel.port1]);
  const answer = async () => { while (!answers.length) await new Promise((resolve) => { woken = resolve; }); return answers.shift(); };
  const varint = (number) => { const out = []; while (number > 127) { out.push(number % 128 | 128); number = Math.floor(number / 128); } return [...out, number]; };
  const field = (id, bytes) => [...varint(id * 8 + 2), ...varint(bytes.length), ...bytes];
  let sequence = 0;
  const ask = (request, rest) => {
    channel.port2.postMessage(new Uint8Array(field(1, [8, ...varint(sequence++), 16, request, ...rest])));
    return answer();
  };
  const [APPEND, FINALIZE, QUERY] = [1, 2, 3];
  const trace = new Uint8Array(await (await fetch("/trace", { cache: "no-store" })).arrayBuffer());
  const said = [await ask(APPEND, field(101, trace)), await ask(FINALIZE, [])];
  for (const query of QUERIES) said.push(await ask(QUERY, field(103, field(1, new TextEncoder().encode(query)))));
  worker.terminate();
  return said;
})()
