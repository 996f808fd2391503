"use strict";
(() => {
  const starts = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main"), detail = document.getElementById("detail");
  const SVG = "http://www.w3.org/2000/svg";
  const make = (name, attributes = {}, ...children) => {
    const svg = ["svg", "rect", "line", "text", "g", "path", "title"].includes(name);
    const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const ms = (ns) => ns === null ? "unknown" : ns >= 1e9 ? (ns / 1e9).toFixed(2) + " s" : ns >= 1e7 ? (ns / 1e6).toFixed(0) + " ms" : (ns / 1e6).toFixed(2) + " ms";
  const size = (bytes) => { const units = ["B", "KiB", "MiB", "GiB"]; let unit = 0; while (bytes >= 1024 && unit < 3) { bytes /= 1024; unit++; } return (unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)) + " " + units[unit]; };
  const colour = (name) => `var(--${name.replace(" ", "-")})`;
  const say = (text) => { detail.textContent = text; };
  const two = starts.length > 1;
  const names = two ? ["A", "B"] : [""];
  const longest = Math.max(...starts.map((start) => start.end_ns));

  // --- light and dark
  const button = document.getElementById("theme");
  const theme = (dark) => { document.documentElement.dataset.theme = dark ? "dark" : "light"; button.setAttribute("aria-pressed", String(dark)); button.textContent = dark ? "Light" : "Dark"; };
  theme(matchMedia("(prefers-color-scheme: dark)").matches);
  button.addEventListener("click", () => theme(document.documentElement.dataset.theme !== "dark"));

  const section = (id, title, text, each) => {
    const beside = make("div", { class: "beside" });
    starts.forEach((start, number) => beside.append(make("div", {}, two ? make("h3", {}, `Start ${names[number]}`) : null, ...[each(start, number)].flat().filter(Boolean))));
    main.append(make("section", { id, "aria-labelledby": id + "-title" }, make("h2", { id: id + "-title" }, title), make("p", {}, text), beside));
  };
  const legend = (items) => make("ul", { class: "legend" }, ...items.map(([name, fill]) => make("li", {}, make("i", { style: `background:${fill}` }), name)));
  const table = (caption, heads, rows) => make("table", {}, make("caption", { style: "text-align:left;color:var(--soft)" }, caption),
    make("thead", {}, make("tr", {}, ...heads.map((head, column) => make("th", { scope: "col", class: column ? "n" : null }, head)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell, column) => make("td", { class: column ? "n" : "path" }, String(cell)))))));
  const asTable = (title, ...of) => make("details", {}, make("summary", {}, title), table(...of));

  // --- numbers
  section("numbers", "In numbers", two ? "What B differs by from A stands below each number." : "From the request for the image to a container that is ready.", (start, number) => {
    const facts = [["ready", start.ready_ns, ms], ["first byte", start.first_byte_ns, ms], ["blocked", start.blocked_ns, ms], ["fetched before ready", start.bytes, size],
      ["round trips", start.round_trips, String], ["touched", start.touched_bytes, size]];
    const list = make("dl", { class: "facts" });
    facts.forEach(([name, value, text], place) => {
      const dd = make("dd", {}, value === null ? "unknown" : text(value));
      if (number === 1) {
        const before = [starts[0].ready_ns, starts[0].first_byte_ns, starts[0].blocked_ns, starts[0].bytes, starts[0].round_trips, starts[0].touched_bytes][place];
        if (before && value !== null) { const part = Math.round((value - before) / before * 100); dd.append(make("br"), make("small", { class: part > 0 ? "worse" : "better" }, `${part > 0 ? "+" : ""}${part} % of A's`)); }
      }
      list.append(make("div", {}, make("dt", {}, name), dd));
    });
    const when = new Date(start.began_at * 1000).toISOString().replace("T", " ").slice(0, 19);
    return [make("div", { class: "who" }, `${start.image || start.digest} · ${start.entry} · ${start.container} · kernel ${start.kernel} · ${when} UTC`), list];
  });

  // --- waterfall
  const axis = (svg, width, left, height, end) => {
    const raw = end / 6, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
    for (let at = 0; at <= end; at += step) {
      const x = left + at / end * (width - left);
      svg.append(make("line", { class: "grid", x1: x, x2: x, y1: 14, y2: height }), make("text", { class: "soft", x, y: 10, "text-anchor": at ? "middle" : "start" }, ms(at)));
    }
  };
  const bars = (svg, all) => {
    // One stop for the keyboard: arrows go from bar to bar, in time.
    all.forEach((bar, place) => {
      bar.node.setAttribute("tabindex", place ? "-1" : "0");
      bar.node.addEventListener("focus", () => say(bar.text));
      bar.node.addEventListener("pointerenter", () => say(bar.text));
    });
    svg.addEventListener("keydown", (event) => {
      const now = all.findIndex((bar) => bar.node === document.activeElement);
      const next = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: all.length - 1 }[event.key];
      if (now < 0 || next === undefined || !all[next]) return;
      event.preventDefault();
      all[now].node.setAttribute("tabindex", "-1"); all[next].node.setAttribute("tabindex", "0"); all[next].node.focus();
    });
  };
  section("waterfall", "Waterfall", "What waited for what, how long, and from where its bytes came. Arrow keys go from bar to bar.", (start, number) => {
    const width = 900, left = 210, row = 15, all = [];
    const lines = start.phases.map(([name, at, took]) => ({ name, bars: [{ at, took, fill: colour("phase"), text: `${name}: ${ms(took)}, from ${ms(at)} on` }] }));
    for (const lane of ["lookup", "start pack", "prefetch", "demand", "fill"]) {
      const own = start.fetches.filter((fetch) => fetch.lane === lane);
      if (own.length) lines.push({ name: `fetch: ${lane}`, bars: own.map((f) => ({ at: f.at, took: f.took, fill: colour(lane), soft: true, text: `fetch for ${lane}: ${size(f.bytes)} in ${ms(f.took)}, first byte after ${ms(f.first)}, from ${ms(f.at)} on` })) });
    }
    const files = new Set(start.files.map((file) => file.path));
    const byFile = new Map();
    for (const wait of start.waits) { const key = files.has(wait.path) ? wait.path : "(other files)"; if (!byFile.has(key)) byFile.set(key, []); byFile.get(key).push(wait); }
    for (const [path, waits] of [...byFile].sort((a, b) => (a[0] === "(other files)") - (b[0] === "(other files)") || a[1][0].at - b[1][0].at))
      lines.push({ name: path, bars: waits.map((w) => ({ at: w.at, took: w.took, fill: colour(w.level), text: `${w.process ? w.process + " " : ""}${w.level === "blocked" ? "was blocked by" : "read"} ${w.path}${w.bytes ? ", " + size(w.bytes) : ""}: ${ms(w.took)} from ${w.level}, at ${ms(w.at)}` })) });
    const height = 20 + lines.length * row;
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Waterfall of start ${names[number]}: ${lines.length} lines over ${ms(start.end_ns)}` });
    axis(svg, width, left, height, longest);
    lines.forEach((line, place) => {
      const y = 18 + place * row, short = line.name.length > 33 ? "…" + line.name.slice(-32) : line.name;
      svg.append(make("text", { x: left - 8, y: y + 10, "text-anchor": "end" }, make("title", {}, line.name), short));
      for (const bar of line.bars) {
        const x = left + bar.at / longest * (width - left), w = Math.max(1.5, bar.took / longest * (width - left));
        const node = make("rect", { class: "bar", x, y: y + 1, width: w, height: row - 4, rx: 2, fill: bar.fill, "fill-opacity": bar.soft ? .55 : .9, role: "img", "aria-label": bar.text });
        svg.append(node); all.push({ node, text: bar.text, at: bar.at });
      }
    });
    if (start.ready_ns !== null) { const x = left + start.ready_ns / longest * (width - left); svg.append(make("line", { class: "ready", x1: x, x2: x, y1: 12, y2: height }), make("text", { x: x - 4, y: 24, "text-anchor": "end" }, "ready")); }
    bars(svg, all);
    return [svg, legend([["step", colour("phase")], ...["registry", "start pack", "prefetch", "disk", "memory", "blocked"].filter((l) => start.waits.some((w) => w.level === l)).map((l) => [`read: ${l}`, colour(l)])]),
      start.left_out ? make("p", {}, `The ${start.left_out} shortest are left out.`) : null,
      asTable("All of it as a table", "Reads", ["file", "at", "took", "from", "bytes"], start.waits.slice(0, 500).map((w) => [w.path, ms(w.at), ms(w.took), w.level, size(w.bytes)]))];
  });

  // --- files
  section("files", "Files that were waited for", "The longest first; read-ahead counts for the file that was asked for.", (start) =>
    table("Files by time waited", ["file", "waited", "reads", "first at"], start.files.slice(0, 15).map((file) => [file.path, ms(file.wait), file.reads, ms(file.first)])));

  // --- levels and prefetch
  section("ahead", "Fetched ahead: hits and waste", "Of what profile and start pack brought, what was read; and from where all reads were answered.", (start) => {
    const part = start.ahead_bytes ? start.ahead_used_bytes / start.ahead_bytes : 0;
    const svg = make("svg", { viewBox: "0 0 900 34", role: "img", "aria-label": start.ahead_bytes ? `${size(start.ahead_used_bytes)} of ${size(start.ahead_bytes)} fetched ahead were read, ${Math.round(part * 100)} %` : "nothing was fetched ahead" });
    if (start.ahead_bytes) svg.append(make("rect", { x: 0, y: 2, width: 900, height: 16, rx: 3, fill: "var(--waste)" }), make("rect", { x: 0, y: 2, width: 900 * part, height: 16, rx: 3, fill: "var(--hit)" }),
      make("text", { x: 0, y: 31 }, `read ${size(start.ahead_used_bytes)} (${Math.round(part * 100)} %)`), make("text", { x: 900, y: 31, "text-anchor": "end" }, `for nothing ${size(start.ahead_bytes - start.ahead_used_bytes)}`));
    else svg.append(make("text", { class: "soft", x: 0, y: 20 }, "nothing was fetched ahead"));
    return [svg, table("Reads by level", ["level", "reads", "bytes", "waited"], start.levels.map((level) => [level.name, level.count, size(level.bytes), ms(level.wait_ns)])),
      start.failures.length ? table("Calls that failed", ["call", "times"], start.failures) : null];
  });

  // --- bandwidth
  section("bandwidth", "Bandwidth", "Bytes that came per second, by whom they were fetched for; stacked.", (start, number) => {
    const width = 900, height = 150, left = 60, lanes = Object.entries(start.bandwidth.lanes), step = start.bandwidth.step;
    const peak = Math.max(1e-6, ...starts.map((one) => { const all = Object.values(one.bandwidth.lanes); return Math.max(0, ...(all[0] || [0]).map((_, i) => all.reduce((sum, lane) => sum + lane[i], 0) / one.bandwidth.step)); }));
    const total = lanes.reduce((sum, [, lane]) => sum + lane.reduce((a, b) => a + b, 0), 0);
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Bandwidth of start ${names[number]}: ${size(total)} in ${ms(start.end_ns)}` });
    axis(svg, width, left, height, longest);
    svg.append(make("text", { class: "soft", x: left - 6, y: 26, "text-anchor": "end" }, size(peak * 1e9) + "/s"));
    const base = [];
    for (const [lane, bytes] of lanes) bytes.forEach((count, place) => {
      if (!count) return;
      const h = count / step / peak * (height - 22), w = Math.max(1, step / longest * (width - left) - .4);
      base[place] = (base[place] || 0) + h;
      svg.append(make("rect", { x: left + place * step / longest * (width - left), y: height - base[place], width: w, height: h, fill: colour(lane) }));
    });
    return [svg, legend(lanes.map(([lane]) => [lane, colour(lane)])), asTable("As a table", "Bytes by lane", ["lane", "bytes", "requests"], lanes.map(([lane, bytes]) => [lane, size(bytes.reduce((a, b) => a + b, 0)), start.fetches.filter((f) => f.lane === lane).length]))];
  });

  // --- layers
  section("layers", "Working set over the layers", "Each cell is a stretch of a layer's contents, in the order of its files.", (start) => [
    ...start.layers.map((layer) => make("div", {}, make("div", { class: "who" }, `${layer.digest.slice(0, 19)}… · ${size(layer.bytes)} · touched ${size(layer.touched)} (${(layer.touched / layer.bytes * 100).toFixed(1)} %)`),
      make("div", { class: "map", role: "img", "aria-label": `layer of ${size(layer.bytes)}: ${size(layer.touched)} touched, ${size(layer.ahead)} fetched ahead` }, ...layer.cells.map((cell) => make("span", { class: "c" + cell }))))),
    legend([["touched", "var(--touched)"], ["touched, and fetched ahead", "var(--hit)"], ["fetched ahead for nothing", "var(--waste)"], ["not touched", "var(--empty)"]])]);
  document.title = two ? "Two container starts" : `Start of ${starts[0].image || starts[0].digest}`;
  document.querySelector("h1").textContent = document.title;
  document.documentElement.dataset.drawn = "yes";
})();
