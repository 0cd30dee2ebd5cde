// The picture with its boxes: drawing, moving and sizing them with pointer and keyboard, and marks over it.
// Boxes are [x0, y0, x1, y1] in pixels of the picture, as everywhere.

import { $, make, makeSvg } from "./dom.js";

const LEAST = 3; // pixels of the screen; a smaller drag is a click
const SETTLED = 350; // milliseconds without a key after which a box has been moved
const GAP = 4; // pixels between a box and its label
const SIZES = ["full", "brief", "number"]; // of labels
const CORNERS = ["nw", "ne", "sw", "se"];

export class Stage {
  /** `on`: drawn(box) -> id, changed(id, box), removed(id), chosen(id or null), opened(id). */
  constructor(on) {
    this.on = on;
    this.stage = $("stage");
    this.image = $("picture");
    this.layer = $("boxes");
    this.marks = $("marks");
    this.names = $("names");
    this.boxes = new Map();
    this.chosen = null;
    this.gesture = null;
    this.views = [];
    this.heat = null;
    this.looked = null;
    this.layer.addEventListener("pointerdown", (event) => this.#down(event));
    this.layer.addEventListener("pointermove", (event) => this.#move(event));
    this.layer.addEventListener("pointerup", (event) => this.#up(event));
    this.layer.addEventListener("pointercancel", () => this.#cancel());
    this.layer.addEventListener("keydown", (event) => this.#key(event));
    // Assistive technology clicks without a pointer.
    this.layer.addEventListener("click", (event) => {
      const element = event.target.closest(".box");
      if (event.detail === 0 && element) this.on.opened(Number(element.dataset.id));
    });
    new ResizeObserver(() => this.#placeLabels()).observe(this.layer);
  }

  get size() {
    return [this.image.naturalWidth, this.image.naturalHeight];
  }

  /** Shows a decoded picture; the boxes of the one before go. */
  async show(url, name) {
    this.clear();
    this.image.src = url;
    this.image.alt = name;
    await this.image.decode();
    const [width, height] = this.size;
    this.stage.style.setProperty("--ratio", String(width / height));
    this.stage.hidden = false;
    this.marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.#draw();
  }

  clear() {
    this.#cancel();
    for (const own of this.boxes.values()) this.#take(own);
    this.boxes.clear();
    this.chosen = null;
    this.views = [];
    this.heat = null;
    this.looked = null;
    this.#draw();
  }

  add(id, box) {
    const element = make("div", {
      class: "box",
      tabindex: "0",
      role: "button",
      "data-id": id,
      "aria-pressed": "false",
    });
    for (const corner of CORNERS) element.append(make("span", { class: `handle ${corner}`, "data-corner": corner }));
    const label = make("div", { class: "label", "aria-hidden": "true", on: { click: () => this.on.opened(id) } });
    label.append(make("b", {}, String(id)), make("span", { class: "full" }), make("span", { class: "brief" }));
    const own = { id, box, element, label, text: "", state: "waiting", timer: null };
    this.boxes.set(id, own);
    this.layer.append(element, label);
    this.#position(own);
    this.describe(id, "", "waiting");
  }

  /** What a box is said to show, in a line and in a word; state is waiting, done or failed. */
  describe(id, text, state, word = "") {
    const own = this.boxes.get(id);
    if (!own) return;
    Object.assign(own, { text, state });
    own.element.dataset.state = state;
    own.label.dataset.state = state;
    const said = { waiting: "being described", failed: "not described" }[state] ?? text;
    own.element.setAttribute("aria-label", `Box ${id}: ${said}`);
    const [, full, brief] = own.label.children;
    full.textContent = { waiting: "…", failed: "not described" }[state] ?? text;
    brief.textContent = { waiting: "…", failed: "!" }[state] ?? word;
    this.#placeLabels();
  }

  remove(id) {
    const own = this.boxes.get(id);
    if (!own) return;
    this.#take(own);
    this.boxes.delete(id);
    if (this.chosen === id) this.choose(null);
    this.#placeLabels();
  }

  choose(id) {
    this.chosen = this.boxes.has(id) ? id : null;
    for (const own of this.boxes.values()) {
      const is = own.id === this.chosen;
      own.element.classList.toggle("chosen", is);
      own.label.classList.toggle("chosen", is);
      own.element.setAttribute("aria-pressed", String(is));
    }
    this.views = [];
    this.heat = null;
    this.#draw();
    this.#placeLabels();
  }

  /** Outlines views; the one at `active` stays clear, the rest of the picture dims. `heat` is a { box, png } over it. */
  showViews(boxes, active = -1, heat = null) {
    this.heat = heat;
    this.views = boxes.map((box, index) => ({ box, active: index === active }));
    this.#draw();
  }

  /** Shows what an answer was made of (the API's `foveate`), or nothing for null. */
  showLooked(looked) {
    this.looked = looked;
    this.stage.classList.toggle("looked", looked !== null);
    this.#draw();
  }

  focus(id) {
    this.boxes.get(id)?.element.focus({ preventScroll: true });
  }

  #take(own) {
    clearTimeout(own.timer);
    own.element.remove();
    own.label.remove();
  }

  // ------------------------------------------------------------------ pointers

  #point(event) {
    const [width, height] = this.size;
    const at = this.layer.getBoundingClientRect();
    const within = (value, most) => Math.min(Math.max(value, 0), most);
    return [
      within(((event.clientX - at.left) / at.width) * width, width),
      within(((event.clientY - at.top) / at.height) * height, height),
    ];
  }

  #down(event) {
    if (event.button !== 0 || !event.isPrimary || this.gesture || event.target.closest(".label")) return;
    event.preventDefault(); // of the focus and of text selection; a click focuses its box below
    this.layer.setPointerCapture(event.pointerId);
    const start = this.#point(event);
    const own = this.boxes.get(this.chosen);
    const corner = event.target.dataset.corner;
    let kind = "draw";
    if (own && corner) kind = "size";
    else if (own && inside(start, own.box)) kind = "move";
    this.gesture = { kind, corner, start, own, from: own?.box, at: [event.clientX, event.clientY], moved: false };
  }

  #move(event) {
    const gesture = this.gesture;
    if (!gesture || !event.isPrimary) return;
    const [dx, dy] = [event.clientX - gesture.at[0], event.clientY - gesture.at[1]];
    if (!gesture.moved && Math.hypot(dx, dy) < LEAST) return;
    gesture.moved = true;
    const point = this.#point(event);
    if (gesture.kind === "draw") {
      gesture.draft ??= this.layer.appendChild(make("div", { class: "box draft" }));
      gesture.box = spanned(gesture.start, point);
      this.#put(gesture.draft, gesture.box);
      return;
    }
    const by = [point[0] - gesture.start[0], point[1] - gesture.start[1]];
    gesture.own.box =
      gesture.kind === "move" ? this.#moved(gesture.from, by) : sized(gesture.from, gesture.corner, point);
    this.#position(gesture.own);
    this.#draw();
  }

  #up(event) {
    const gesture = this.gesture;
    if (!gesture || !event.isPrimary) return;
    this.gesture = null;
    gesture.draft?.remove();
    if (!gesture.moved) {
      const hit = this.#hit(gesture.start);
      if (hit === null) this.on.chosen(null);
      else {
        this.on.opened(hit);
        this.focus(hit);
      }
    } else if (gesture.kind === "draw") {
      const box = rounded(gesture.box);
      if (large(box)) this.focus(this.on.drawn(box));
    } else {
      const box = rounded(gesture.own.box);
      if (large(box)) this.#change(gesture.own, box);
      else this.#change(gesture.own, gesture.from);
    }
  }

  #cancel() {
    const gesture = this.gesture;
    this.gesture = null;
    gesture?.draft?.remove();
    if (gesture?.own && this.boxes.has(gesture.own.id)) {
      gesture.own.box = gesture.from;
      this.#position(gesture.own);
      this.#draw();
    }
  }

  /** The smallest box at a point. */
  #hit(point) {
    let best = null;
    let least = Infinity;
    for (const { id, box } of this.boxes.values()) {
      const area = (box[2] - box[0]) * (box[3] - box[1]);
      if (inside(point, box) && area < least) [best, least] = [id, area];
    }
    return best;
  }

  #moved([x0, y0, x1, y1], [dx, dy]) {
    const [width, height] = this.size;
    dx = Math.min(Math.max(dx, -x0), width - x1);
    dy = Math.min(Math.max(dy, -y0), height - y1);
    return [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
  }

  #change(own, box) {
    const same = box.every((value, index) => value === own.told?.[index]);
    own.box = box;
    this.#position(own);
    this.#draw();
    this.#placeLabels();
    if (!same) this.on.changed(own.id, box);
  }

  // ------------------------------------------------------------------ keyboard

  /** A box in the middle of the picture, a third of its size. */
  addInTheMiddle() {
    const [width, height] = this.size;
    const box = rounded([width / 3, height / 3, (2 * width) / 3, (2 * height) / 3]);
    this.focus(this.on.drawn(large(box) ? box : [0, 0, width, height]));
  }

  #key(event) {
    const own = this.boxes.get(Number(event.target.closest(".box")?.dataset.id));
    if (!own || event.altKey || event.metaKey) return;
    const [width, height] = this.size;
    const step = event.ctrlKey ? 1 : Math.max(1, Math.round(Math.max(width, height) / 50));
    const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
    if (by) {
      let box = this.#moved(own.box, by);
      if (event.shiftKey) {
        const [x0, y0, x1, y1] = own.box;
        box = [x0, y0, Math.min(x1 + by[0], width), Math.min(y1 + by[1], height)];
        if (box[2] - x0 < 1 || box[3] - y0 < 1) box = own.box;
      }
      if (this.chosen !== own.id) this.on.chosen(own.id);
      own.box = box;
      this.#position(own);
      this.#draw();
      this.#placeLabels();
      clearTimeout(own.timer);
      own.timer = setTimeout(() => this.#change(own, own.box), SETTLED);
    } else if (event.key === "Enter" || event.key === " ") {
      this.on.opened(own.id, true);
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.on.removed(own.id);
    } else if (event.key === "Escape") {
      this.on.chosen(null);
    } else return;
    event.preventDefault();
  }

  /** Marks the place that a box is described at. */
  told(id) {
    const own = this.boxes.get(id);
    if (own) own.told = own.box;
  }

  // ------------------------------------------------------------------ drawing

  #position(own) {
    if (own.id === this.chosen) this.heat = null; // it was read where the box was before
    this.#put(own.element, own.box);
  }

  #put(element, [x0, y0, x1, y1]) {
    const [width, height] = this.size;
    element.style.setProperty("left", `${(100 * x0) / width}%`);
    element.style.setProperty("top", `${(100 * y0) / height}%`);
    element.style.setProperty("width", `${(100 * (x1 - x0)) / width}%`);
    element.style.setProperty("height", `${(100 * (y1 - y0)) / height}%`);
  }

  #draw() {
    const [width, height] = this.size;
    this.marks.replaceChildren();
    this.names.replaceChildren();
    if (!width) return;
    const whole = `M0 0H${width}V${height}H0Z`;
    const hole = ([x0, y0, x1, y1]) => `M${x0} ${y0}V${y1}H${x1}V${y0}Z`;
    if (this.looked) {
      for (const partition of this.looked.kept?.partitions ?? []) {
        const [left, top, right, bottom] = partition.region;
        const [across, down] = [(right - left) / partition.grid, (bottom - top) / partition.grid];
        const cells = partition.tokens.map((token) => {
          const [column, row] = [token % partition.grid, Math.floor(token / partition.grid)];
          return [left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down];
        });
        const veil =
          hole(partition.region) + cells.map(([x0, y0, x1, y1]) => `M${x0} ${y0}H${x1}V${y1}H${x0}Z`).join("");
        this.marks.append(makeSvg("path", { class: "veil strong", d: veil, "fill-rule": "evenodd" }));
        this.marks.append(makeSvg("path", { class: "cell", d: cells.map(hole).join("") }));
      }
      for (const [index, box] of this.looked.boxes.entries()) {
        this.marks.append(makeSvg("path", { class: "object", d: hole(box) }));
        const word = this.looked.labels[index];
        if (!word) continue;
        const vars = { left: `${(100 * box[0]) / width}%`, top: `${(100 * box[1]) / height}%` };
        this.names.append(
          make("span", { class: box[1] < height / 16 ? "object-name within" : "object-name", vars }, word),
        );
      }
      return;
    }
    const active = this.views.find((view) => view.active);
    const clear = active?.box ?? this.boxes.get(this.chosen)?.box;
    if (clear) this.marks.append(makeSvg("path", { class: "veil", d: whole + hole(clear), "fill-rule": "evenodd" }));
    if (this.heat) {
      const { box, png } = this.heat;
      const place = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
      this.marks.append(makeSvg("image", { class: "heat", href: png, preserveAspectRatio: "none", ...place }));
    }
    for (const view of this.views) {
      this.marks.append(makeSvg("path", { class: view.active ? "outline active" : "outline", d: hole(view.box) }));
    }
  }

  /** Puts each label beside its box where it covers neither another label nor, if that can be, another box. */
  #placeLabels() {
    const [width, height] = [this.layer.clientWidth, this.layer.clientHeight];
    const [imageWidth, imageHeight] = this.size;
    if (!width || !imageWidth) return;
    const scale = [width / imageWidth, height / imageHeight];
    const all = [...this.boxes.values()];
    const frames = new Map(all.map(({ id, box }) => [id, box.map((value, index) => value * scale[index % 2])]));
    const placed = [];
    const order = all.toSorted((a, b) => (b.id === this.chosen) - (a.id === this.chosen) || a.id - b.id);
    const sizes = SIZES.map((size) => {
      for (const { label } of order) label.dataset.size = size;
      return new Map(order.map(({ id, label }) => [id, [label.offsetWidth, label.offsetHeight]]));
    });
    const free = ([x, y], [w, h], taken) =>
      !taken.some((other) => x < other[2] && x + w > other[0] && y < other[3] && y + h > other[1]);
    const fits = ([x, y], [w, h]) => x >= 1 && y >= 1 && x + w <= width - 1 && y + h <= height - 1;
    for (const { id, label } of order) {
      const frame = frames.get(id);
      const others = [...frames].filter(([other]) => other !== id).map(([, taken]) => taken);
      let [size, spot] = [null, null];
      for (const [index, of] of sizes.entries()) {
        const spots = beside(frame, of.get(id)).filter((one) => fits(one, of.get(id)) && free(one, of.get(id), placed));
        spot = spots.find((one) => free(one, of.get(id), others)) ?? (id === this.chosen ? spots[0] : undefined);
        if (!spot) continue;
        size = index;
        break;
      }
      if (!spot) {
        // No room anywhere: the number stands in the box's corner; of the chosen box the text stays.
        size = id === this.chosen ? 0 : SIZES.length - 1;
        const [w, h] = sizes[size].get(id);
        spot = [
          Math.min(Math.max(frame[0] + 2, 1), width - w - 1),
          Math.min(Math.max(frame[1] + 2, 1), height - h - 1),
        ];
      }
      const [w, h] = sizes[size].get(id);
      placed.push([spot[0], spot[1], spot[0] + w, spot[1] + h]);
      label.dataset.size = SIZES[size];
      label.style.setProperty("left", `${spot[0]}px`);
      label.style.setProperty("top", `${spot[1]}px`);
    }
  }
}

/** Where a label may stand, the best first. */
function beside([x0, y0, x1, y1], [w, h]) {
  const middle = (x0 + x1 - w) / 2;
  const [above, below] = [y0 - h - GAP, y1 + GAP];
  const spots = [
    [x0, above],
    [x0, below],
    [x1 - w, above],
    [x1 - w, below],
    [middle, above],
    [middle, below],
    [x1 + GAP, y0],
    [x0 - w - GAP, y0],
    [x1 + GAP, y1 - h],
    [x0 - w - GAP, y1 - h],
  ];
  if (x1 - x0 > w + 2 * GAP && y1 - y0 > 2 * h) spots.push([x0 + GAP, y0 + GAP]);
  return spots;
}

const inside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const spanned = ([ax, ay], [bx, by]) => [Math.min(ax, bx), Math.min(ay, by), Math.max(ax, bx), Math.max(ay, by)];
const rounded = (box) => box.map((value) => Math.round(value));
const large = ([x0, y0, x1, y1]) => x1 - x0 >= 2 && y1 - y0 >= 2;

function sized([x0, y0, x1, y1], corner, point) {
  const fixed = [corner.includes("w") ? x1 : x0, corner.includes("n") ? y1 : y0];
  return spanned(fixed, point);
}
