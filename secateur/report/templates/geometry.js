"use strict";
(async () => {
  const G = data.geometry, N = G.labels.length, K = G.conditions.length, A = G.axes.length, M = G.models.length, P = G.occluded.length;
  const raw = await new Response(new Blob([bytes(G.blob)]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  const four = new Uint16Array(raw, 0, M * K * 4 * N), degrees = new Uint8Array(raw, 8 * M * K * N, M * K * A * N);
  const [rows, cols] = G.map, changes = new Uint8Array(raw, 8 * M * K * N + M * K * A * N);
  const value = (m, k, what, i) => { const [low, high] = G.bounds[what]; return low + four[((m * K + k) * 4 + what) * N + i] / 65535 * (high - low); };
  const guess = (m, k, i) => four[((m * K + k) * 4 + 3) * N + i], right = (m, k, i) => guess(m, k, i) === G.labels[i];
  const angle = (m, k, axis, i) => degrees[((m * K + k) * A + axis) * N + i];
  const called = c => G.names[c] ?? String(c), titled = m => G.models[m].method + (G.models[m].method === "dense" ? "" : " " + G.models[m].target);
  const under = k => G.conditions[k][0].replaceAll("_", " ") + (k ? " " + G.conditions[k][1] : "");
  const state = {a: Math.min(1, M - 1), b: 0, k: 0, klass: "", picked: new Set(), cursor: null, axis: 0};
  const svg = (tag, attributes, look) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const name in attributes) e.setAttribute(name, attributes[name]); if (look) e.setAttribute("class", look); return e; };
  const every = [...Array(N).keys()], inside = () => every.filter(i => state.klass === "" || G.labels[i] === +state.klass);
  const share = (m, k) => [...state.picked].filter(i => right(m, k, i)).length;
  const colour = m => G.models[m].method === "dense" ? "var(--ink)" : m <= COLOURS.length ? COLOURS[m - 1] : "hsl(" + m * 137.5 % 360 + " 62% 45%)";
  const describe = i => "picture " + i + ", " + called(G.labels[i]) + ": A says " + called(guess(state.a, state.k, i)) + ", B says " + called(guess(state.b, state.k, i)) + "; angle " + value(state.a, state.k, 0, i).toFixed(1)
    + "°, norm " + value(state.a, state.k, 1, i).toFixed(2) + ", margin " + value(state.a, state.k, 2, i).toFixed(2) + (state.picked.has(i) ? "; picked" : "");
  const pick = (which, add) => { if (!add) state.picked.clear(); for (const i of which) state.picked.add(i); draw(); };
  const toggle = i => { state.picked.has(i) ? state.picked.delete(i) : state.picked.add(i); state.cursor = i; draw(); };
  const choose = (m, k) => { state.a = m; state.k = k; $("model-a").value = m; $("condition").value = k; draw(); };

  // 1. evaluation
  const bars = counts => {
    const most = Math.max(...counts, 1), made = svg("svg", {viewBox: "0 0 100 32", "aria-hidden": "true", preserveAspectRatio: "none"}), [low, high] = G.span;
    counts.forEach((count, n) => made.append(svg("rect", {x: 100 * n / counts.length, width: 100 / counts.length - 1, y: 32 - 32 * count / most, height: 32 * count / most}, low + (n + .5) * (high - low) / counts.length > 0 ? "plus" : "")));
    return made;
  };
  const evaluation = () => {
    const severity = +$("severity").value, which = [...Array(K).keys()].filter(k => !k || G.conditions[k][1] === severity);
    const top = make("tr"), n = state.picked.size;
    top.append(make("th", "model"), ...which.map(k => make("th", k ? G.conditions[k][0].replaceAll("_", " ") : "clean")));
    $("cells").tHead.replaceChildren(top);
    const line = (model, m) => {
      const row = make("tr");
      row.append(make("td", model.method + (model.method === "dense" ? "" : " " + model.target)));
      for (const k of which) {
        const cell = make("td"), text = fixed(100 * model.accuracy[k], 1);
        if (m === null) cell.append(text);
        else {
          const button = make("button", text, m === state.b && k === state.k && m !== state.a ? "b" : "");
          button.type = "button";
          button.dataset.m = m; button.dataset.k = k;
          button.setAttribute("aria-pressed", m === state.a && k === state.k);
          button.setAttribute("aria-label", titled(m) + ", " + under(k) + ": " + text + " %" + (n ? ", " + share(m, k) + " of " + n + " picked are right" : ""));
          button.append(bars(model.histogram[k]));
          if (n) button.append(make("b", share(m, k) + "/" + n));
          cell.append(button);
        }
        row.append(cell);
      }
      return row;
    };
    $("cells").tBodies[0].replaceChildren(...G.models.map(line), ...G.rest.map(model => line(model, null)));
  };
  $("cells").addEventListener("click", event => { const b = event.target.closest("button"); if (b) { choose(+b.dataset.m, +b.dataset.k); $("cells").querySelector("[data-m='" + b.dataset.m + "'][data-k='" + b.dataset.k + "']").focus(); } });

  // 2. similarity
  const xs = G.places.map(p => p[2]), ys = G.places.map(p => p[3]), [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const zoom = Math.min(560 / (x1 - x0 || 1), 360 / (y1 - y0 || 1)), at = p => [300 + (p[2] - (x0 + x1) / 2) * zoom, 200 - (p[3] - (y0 + y1) / 2) * zoom];
  const similarity = () => {
    const lines = G.edges.map(([i, j]) => { const [a, b] = [at(G.places[i]), at(G.places[j])]; return "M" + a + "L" + b; }).join("");
    const marks = G.places.map((p, n) => {
      const [x, y] = at(p), [m, k] = p, size = 3 + (G.conditions[k][1] || 0) * .7, known = m < M;
      const e = k ? svg("circle", {cx: x, cy: y, r: size}) : svg("rect", {x: x - 5, y: y - 5, width: 10, height: 10});
      e.setAttribute("class", "place"); e.setAttribute("data-n", n);
      e.style.stroke = e.style.fill = known ? colour(m) : "var(--before)";
      e.setAttribute("fill-opacity", !known ? .2 : state.picked.size ? (share(m, k) / state.picked.size).toFixed(3) : .6);
      if (known) e.append(svg("title", {}));
      if (known) e.lastChild.textContent = titled(m) + ", " + under(k);
      return e;
    });
    const rings = [["", state.a], ["b", state.b]].flatMap(([look, m]) => { const p = G.places.find(p => p[0] === m && p[1] === state.k); return p ? [svg("circle", {cx: at(p)[0], cy: at(p)[1], r: 11}, "ring " + look)] : []; });
    $("alike").replaceChildren(svg("path", {d: lines}, "edge"), ...marks, ...rings);
  };
  const near = (element, event, places) => {
    const box = element.getBoundingClientRect(), view = element.viewBox.baseVal, x = (event.clientX - box.left) / box.width * view.width, y = (event.clientY - box.top) / box.height * view.height;
    let best = null, least = 26 * view.width / box.width;
    places.forEach(([px, py], n) => { const d = Math.hypot(px - x, py - y); if (d < least) [best, least] = [n, d]; });
    return [best, x, y];
  };
  $("alike").addEventListener("click", event => { const [n] = near($("alike"), event, G.places.map(at)); if (n !== null && G.places[n][0] < M) choose(G.places[n][0], G.places[n][1]); });
  $("alike").addEventListener("keydown", event => {
    const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (!step) return;
    event.preventDefault();
    choose((state.a + step[0] + M) % M, (state.k + step[1] + K) % K);
    $("said").textContent = titled(state.a) + ", " + under(state.k) + ": " + fixed(100 * G.models[state.a].accuracy[state.k], 1) + " %";
  });

  // 3. local
  let points = [];
  const ticks = (low, high, count = 5) => { const step = (high - low) / count; return [...Array(count + 1).keys()].map(n => low + n * step); };
  const local = () => {
    const change = $("change").checked, {a, b, k} = state, read = (what, i) => value(a, k, what, i) - (change ? value(b, k, what, i) : 0);
    const px = every.map(i => read(0, i)), py = every.map(i => read(1, i)), span = v => { const low = Math.min(...v), high = Math.max(...v), more = (high - low || 1) * .05; return [low - more, high + more]; };
    const [lx, hx] = span(px), [ly, hy] = span(py), X = v => 46 + (v - lx) / (hx - lx) * 544, Y = v => 356 - (v - ly) / (hy - ly) * 346;
    points = every.map(i => [X(px[i]), Y(py[i])]);
    const out = [];
    for (const v of ticks(lx, hx)) { const t = svg("text", {x: X(v), y: 374, "text-anchor": "middle"}); t.textContent = v.toFixed(0); out.push(svg("line", {x1: X(v), x2: X(v), y1: 10, y2: 356}, "axis"), t); }
    for (const v of ticks(ly, hy)) { const t = svg("text", {x: 40, y: Y(v) + 4, "text-anchor": "end"}); t.textContent = v.toPrecision(2); out.push(svg("line", {x1: 46, x2: 590, y1: Y(v), y2: Y(v)}, "axis"), t); }
    const title = svg("text", {x: 318, y: 393, "text-anchor": "middle"}); title.textContent = (change ? "change of the " : "") + "angle to the own class, degrees";
    const side = svg("text", {x: 50, y: 22}); side.textContent = (change ? "change of the " : "") + "norm";
    const shown = new Set(inside());
    const order = every.filter(i => !state.picked.has(i)).concat([...state.picked]);
    const marks = order.map(i => {
      const [x, y] = points[i], ok = right(a, k, i), e = ok || state.picked.has(i) ? svg("circle", {cx: x, cy: y, r: 4.5}) : svg("path", {d: "M" + (x - 4) + " " + (y - 4) + "l8 8m0 -8l-8 8"});
      e.setAttribute("class", "dot " + (ok ? "right" : "wrong") + (state.picked.has(i) ? " picked" : "") + (state.cursor === i ? " cursor" : "") + (shown.has(i) || state.picked.has(i) ? "" : " faint"));
      e.setAttribute("data-i", i);
      return e;
    });
    $("local").replaceChildren(...out, title, side, ...marks);
  };
  const keys = (element, order, sideways) => element.addEventListener("keydown", event => {
    if (event.key === "Escape") { pick([]); event.preventDefault(); return; }
    if (event.key === " " || event.key === "Enter") { if (state.cursor !== null) { toggle(state.cursor); $("said").textContent = describe(state.cursor); } event.preventDefault(); return; }
    const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!step) return;
    event.preventDefault();
    if (sideways && (event.key === "ArrowLeft" || event.key === "ArrowRight")) { state.axis = (state.axis + step + A + 3) % (A + 3); $("said").textContent = "axis " + axes()[state.axis].name; draw(); return; }
    const list = order(), place = list.indexOf(state.cursor);
    state.cursor = list[place < 0 ? 0 : (place + step + list.length) % list.length];
    draw();
    $("said").textContent = describe(state.cursor);
  });
  keys($("local"), () => inside().sort((i, j) => points[i][0] - points[j][0]), false);
  const boxed = (element, done, tapped) => {
    let from = null, box = null;
    const place = event => near(element, event, []).slice(1);
    element.addEventListener("pointerdown", event => { from = place(event); if (event.pointerType !== "touch") element.setPointerCapture(event.pointerId); });
    element.addEventListener("pointermove", event => {
      if (!from || event.pointerType === "touch") return;
      const [x, y] = place(event), [u, v] = from;
      if (!box && Math.hypot(x - u, y - v) < 6) return;
      if (!box) element.append(box = svg("rect", {}, "box"));
      for (const [name, n] of [["x", Math.min(x, u)], ["y", Math.min(y, v)], ["width", Math.abs(x - u)], ["height", Math.abs(y - v)]]) box.setAttribute(name, n);
    });
    element.addEventListener("pointerup", event => {
      if (!from) return;
      const [x, y] = place(event), [u, v] = from, made = box;
      from = box = null;
      if (made) { made.remove(); done(Math.min(x, u), Math.max(x, u), Math.min(y, v), Math.max(y, v), event.shiftKey); } else tapped(event);
    });
    element.addEventListener("pointercancel", () => { box?.remove(); from = box = null; });
  };
  boxed($("local"), (l, r, t, b, add) => pick(inside().filter(i => points[i][0] >= l && points[i][0] <= r && points[i][1] >= t && points[i][1] <= b), add),
    event => { const [i] = near($("local"), event, points); if (i !== null) toggle(i); });

  // 4. global
  let [narrow, wide] = [180, 0];
  for (const v of degrees) { if (v < narrow) narrow = v; if (v > wide) wide = v; }
  const axes = () => [
    ...G.axes.map((c, n) => ({name: called(c), low: narrow, high: wide, read: i => angle(state.a, state.k, n, i)})),
    ...["own angle", "norm", "margin"].map((name, what) => ({name, low: what ? G.bounds[what][0] : narrow, high: what ? G.bounds[what][1] : wide, read: i => value(state.a, state.k, what, i)}))];
  const across = n => 40 + n * 1100 / (A + 2), up = (axis, v) => 335 - (v - axis.low) / (axis.high - axis.low || 1) * 305;
  const path = (list, i) => "M" + list.map((axis, n) => across(n).toFixed(1) + " " + up(axis, axis.read(i)).toFixed(1)).join("L");
  const parallel = () => {
    const list = axes(), out = [], shown = inside().filter(i => !state.picked.has(i));
    for (const i of shown) out.push(svg("path", {d: path(list, i), style: "stroke:var(" + (right(state.a, state.k, i) ? "--kept" : "--bad") + ")"}, "lines"));
    list.forEach((axis, n) => {
      out.push(svg("line", {x1: across(n), x2: across(n), y1: 30, y2: 335, style: n === state.axis ? "stroke:var(--soft);stroke-width:2" : ""}, "axis"));
      const name = svg("text", {x: across(n), y: n % 2 && A > 6 ? 372 : 354, "text-anchor": "middle"}); name.textContent = axis.name;
      const high = svg("text", {x: across(n), y: 20, "text-anchor": "middle"}); high.textContent = axis.high.toPrecision(3);
      const low = svg("text", {x: across(n) + 4, y: 332}); low.textContent = axis.low.toPrecision(2);
      out.push(name, high, low);
    });
    for (const i of state.picked) { const e = svg("path", {d: path(list, i), "data-i": i}, "line picked" + (right(state.a, state.k, i) ? "" : " off")); out.push(e); }
    if (state.cursor !== null) out.push(svg("path", {d: path(list, state.cursor)}, "line cursor"));
    $("global").replaceChildren(...out);
  };
  keys($("global"), () => { const axis = axes()[state.axis]; return inside().sort((i, j) => axis.read(j) - axis.read(i)); }, true);
  const axisAt = x => Math.max(0, Math.min(A + 2, Math.round((x - 40) / 1100 * (A + 2))));
  boxed($("global"), (l, r, t, b, add) => {
    const list = axes(), n = [...list.keys()].filter(n => across(n) >= l - 20 && across(n) <= r + 20), which = n.length ? n : [axisAt((l + r) / 2)];
    state.axis = which[0];
    pick(inside().filter(i => which.every(n => { const y = up(list[n], list[n].read(i)); return y >= t && y <= b; })), add);
  }, event => {
    const [, x] = near($("global"), event, []), n = axisAt(x), axis = axes()[n], here = inside();
    const [place] = near($("global"), event, here.map(i => [across(n), up(axis, axis.read(i))]));
    state.axis = n;
    if (place !== null) toggle(here[place]); else draw();
  });

  // 5. attribution and 6. pictures
  const sheet = async url => { const image = new Image(); image.src = url; await image.decode(); return image; };
  const sheets = G.sheets ? [await sheet(G.sheets.clean), await sheet(G.sheets.corrupted)] : null;
  const tile = (image, column, row) => {
    const {wide, high} = G.sheets, canvas = make("canvas");
    [canvas.width, canvas.height] = [wide, high];
    canvas.getContext("2d").drawImage(image, column * wide, row * high, wide, high, 0, 0, wide, high);
    return canvas;
  };
  const seen = (i, k) => {
    if (!sheets) return null;
    if (!k) return tile(sheets[0], i % G.sheets.columns, Math.floor(i / G.sheets.columns));
    const place = G.sheets.shown.indexOf(i);
    return place < 0 ? null : tile(sheets[1], place, k);
  };
  const heat = (m, p, what) => {
    const canvas = make("canvas"), image = new ImageData(cols, rows), from = ((m * P + p) * 3 + what) * rows * cols;
    [canvas.width, canvas.height] = [cols, rows];
    for (let n = 0; n < rows * cols; n++) { const v = (changes[from + n] - 128) / 127, w = Math.min(1, Math.abs(v)), c = v < 0 ? [0, 90, 200] : [215, 105, 0]; image.data.set([...c.map(c => Math.round(245 + (c - 245) * w)), 255], 4 * n); }
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.title = ["angle", "norm", "margin"][what] + ": up to " + G.scales[m][what].toPrecision(3);
    return canvas;
  };
  const button = (i, look) => {
    const made = make("button", undefined, "tile " + look);
    made.type = "button"; made.dataset.i = i;
    made.setAttribute("aria-pressed", state.picked.has(i));
    made.addEventListener("click", () => { const home = made.parentNode; toggle(i); home.querySelector("[data-i='" + i + "']")?.focus(); });
    return made;
  };
  const attribution = () => $("patches").replaceChildren(...G.occluded.map((i, p) => [i, p]).sort((x, y) => state.picked.has(y[0]) - state.picked.has(x[0])).map(([i, p]) => {
    const made = button(i, "maps4"), own = seen(i, 0);
    if (own) made.append(own);
    made.append(...[0, 1, 2].map(what => heat(state.a, p, what)), make("div", "picture " + i + ", " + called(G.labels[i]) + "; at most " + G.scales[state.a].map((s, n) => s.toPrecision(2) + ["°", "", ""][n]).join(", ")));
    return made;
  }));
  const MOST = 24;
  const samples = () => {
    const {a, b, k} = state, least = (i, j) => value(a, k, 2, i) - value(a, k, 2, j), list = (state.picked.size ? [...state.picked].sort(least) : inside().sort(least)).slice(0, MOST);
    $("which").textContent = (state.picked.size ? "Picked" : "None is picked: those of the least margin") + ", under " + under(k) + (state.picked.size > MOST ? "; " + MOST + " of " + state.picked.size : "")
      + (k && sheets && list.some(i => !G.sheets.shown.includes(i)) ? ". Of " + G.sheets.shown.length + " pictures the corrupted form is on the page." : "");
    $("pictures").replaceChildren(...list.map(i => {
      const made = button(i, "");
      for (const canvas of [seen(i, 0), k ? seen(i, k) : null]) if (canvas) made.append(canvas);
      made.append(make("div", called(G.labels[i]) + " (" + i + "); A: " + called(guess(a, k, i)) + ", B: " + called(guess(b, k, i)), right(a, k, i) ? "" : "bad"),
        make("div", value(a, k, 0, i).toFixed(1) + "°, norm " + value(a, k, 1, i).toFixed(2) + ", margin " + value(a, k, 2, i).toFixed(2), "soft"));
      return made;
    }));
  };
  const beside = () => {
    const {a, b, k} = state, mean = v => v.reduce((s, x) => s + x, 0) / v.length, groups = [["all", every], ...(state.picked.size ? [["picked", [...state.picked]]] : []), ...[...new Set(G.labels)].sort((x, y) => x - y).slice(0, 12).map(c => [called(c), every.filter(i => G.labels[i] === c)])];
    const told = (m, list) => [share_(m, list), ...[0, 1, 2].map(what => { const v = list.map(i => value(m, k, what, i)), own = mean(v); return own.toFixed(what ? 2 : 1) + " (" + mean(v.map(x => (x - own) ** 2)).toPrecision(3) + ")"; })];
    const share_ = (m, list) => fixed(100 * list.filter(i => right(m, k, i)).length / list.length, 1, " %");
    $("beside").replaceChildren(grid(["class", "A: accuracy", "angle (variance)", "norm", "margin", "B: accuracy", "angle (variance)", "norm", "margin", "lost", "won"], groups.map(([name, list]) => [name, ...told(a, list), ...told(b, list),
      list.filter(i => !right(a, k, i) && right(b, k, i)).length, list.filter(i => right(a, k, i) && !right(b, k, i)).length])));
  };
  const draw = () => {
    $("many").textContent = state.picked.size;
    for (const view of [evaluation, similarity, local, parallel, attribution, samples, beside]) view();
  };
  const option = (menu, text, value) => { const made = make("option", text); made.value = value; menu.append(made); };
  for (const id of ["model-a", "model-b"]) G.models.forEach((_, m) => option($(id), titled(m), m));
  G.conditions.forEach((_, k) => option($("condition"), under(k), k));
  [...new Set(G.labels)].sort((x, y) => x - y).forEach(c => option($("klass"), called(c), c));
  [$("model-a").value, $("model-b").value, $("condition").value] = [state.a, state.b, state.k];
  G.models.forEach((_, m) => { const key = make("span", undefined, "key"), spot = make("i"); spot.style.background = colour(m); key.append(spot, titled(m)); $("keys").append(key); });
  for (const [id, name] of [["model-a", "a"], ["model-b", "b"], ["condition", "k"]]) $(id).addEventListener("input", () => { state[name] = +$(id).value; draw(); });
  $("klass").addEventListener("input", () => { state.klass = $("klass").value; draw(); });
  $("severity").addEventListener("input", evaluation);
  $("change").addEventListener("input", local);
  for (const made of document.querySelectorAll("#chosen button")) made.addEventListener("click", () => {
    const {a, b, k} = state;
    pick({none: () => [], wrong: () => inside().filter(i => !right(a, k, i)), lost: () => inside().filter(i => !right(a, k, i) && right(b, k, i)), fragile: () => G.fragile.slice(0, 12), robust: () => G.robust}[made.dataset.pick]());
    $("said").textContent = state.picked.size + " picked";
  });
  draw();
  document.documentElement.dataset.views = "yes";
})().catch(error => { document.getElementById("said").textContent = "The views could not be drawn: " + error; });
