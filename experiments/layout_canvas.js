// <layout-canvas>: draws and edits boxes over an image, for the tab "Layout" of the demo page (layout_page.py).
//
// `LayoutCanvas.show(scene)` shows an image and its boxes, if need be when the tab is opened; `regions` of the element is
// the JSON of the boxes as they are now. Coordinates are fractions of the image. Later boxes are in front. `id` is the
// number of a box in the scene, null for one drawn since.

const HANDLE = 9;  // pixels around a corner that take hold of it
const LEAST = 6;  // pixels: smaller boxes are a click, not a box
const STYLE = `
  :host { display: block; max-width: 480px; font-size: 14px; }
  canvas { display: block; width: 100%; border-radius: 6px; touch-action: none; outline: none;
           border: 1px solid var(--border-color-primary, #ccc); }
  .tools { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-top: 8px; }
  .tools > * { font: inherit; padding: 4px 10px; border-radius: 6px; color: var(--body-text-color, #222);
               border: 1px solid var(--border-color-primary, #ccc); background: var(--input-background-fill, #fff); }
  button { cursor: pointer; }
  :disabled { opacity: 0.45; cursor: default; }
`;

class LayoutCanvas extends HTMLElement {
  static latest = null;  // the scene to show

  static show(scene) {
    if (!scene) return;  // of a model that reads no boxes
    LayoutCanvas.latest = scene;
    document.querySelector("layout-canvas")?.show(scene);
  }

  constructor() {
    super();
    this.scene = { key: null, image: null, regions: [], classes: [], colors: [], class_colors: [], size: [1, 1] };
    this.boxes = [];  // as they are now: {id, box: [left, top, right, bottom], number, color}
    this.selected = null;
    this.drag = null;  // what the pointer does: {box, start, sides}; sides: which of the four edges follow it
    this.attachShadow({ mode: "open" }).innerHTML = `<style>${STYLE}</style>
      <canvas tabindex="0" aria-label="layout"></canvas>
      <div class="tools">
        <select aria-label="class of the box"></select>
        <select aria-label="colour of the box"></select>
        <button type="button" aria-label="remove the box">remove box</button>
        <button type="button" aria-label="undo all changes">undo changes</button>
      </div>`;
    this.canvas = this.shadowRoot.querySelector("canvas");
    [this.classes, this.colors] = this.shadowRoot.querySelectorAll("select");
    [this.removal, this.undo] = this.shadowRoot.querySelectorAll("button");
    this.listen();
  }

  connectedCallback() {
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    if (LayoutCanvas.latest) this.show(LayoutCanvas.latest);
    this.draw();
  }

  // The page

  show(scene) {
    if (scene.key === this.scene.key) return;  // it is on the canvas already, perhaps edited
    const names = JSON.stringify([scene.classes, scene.colors]);
    if (names !== JSON.stringify([this.scene.classes, this.scene.colors])) {
      this.classes.replaceChildren(...scene.classes.map((name, number) => new Option(name, number)));
      this.colors.replaceChildren(...scene.colors.map(([name], number) => new Option(name, number)));
      this.colors.hidden = !scene.colors.length;
    }
    this.scene = scene;
    this.picture = null;
    if (scene.image) {
      const picture = new Image();
      picture.onload = () => { this.picture = picture; this.draw(); };
      picture.src = scene.image;
    }
    this.reset();
  }

  reset() {
    this.boxes = this.scene.regions.map((region, id) => ({ ...region, id, box: [...region.box] }));
    this.selected = this.drag = null;
    this.draw();
  }

  get regions() {
    return JSON.stringify(this.boxes);
  }

  // The user

  listen() {
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", () => this.release());
    this.canvas.addEventListener("pointercancel", () => this.release());
    this.canvas.addEventListener("keydown", (event) => {
      if (event.key === "Delete" || event.key === "Backspace") { event.preventDefault(); this.remove(); }
    });
    this.removal.addEventListener("click", () => this.remove());
    this.undo.addEventListener("click", () => this.reset());
    this.classes.addEventListener("change", () => this.relabel());
    this.colors.addEventListener("change", () => this.relabel());
  }

  press(event) {
    const point = this.point(event);
    this.canvas.setPointerCapture(event.pointerId);
    const { box, sides } = this.at(point);
    this.selected = box;
    if (box) {
      this.drag = { box, sides, start: point, from: [...box.box] };
      this.classes.value = box.number;
      if (box.color !== null) this.colors.value = box.color;
    } else {
      const added = { id: null, box: [...point, ...point], ...this.label() };
      this.drag = { box: added, sides: [2, 3], start: point, from: [...added.box], isNew: true };
    }
    this.draw();
  }

  move(event) {
    const point = this.point(event);
    if (!this.drag) {
      const { box, sides } = this.at(point);
      this.canvas.style.cursor = !box ? "crosshair" : sides.length === 4 ? "move" : "nwse-resize";
      return;
    }
    const { box, sides, start, from, isNew } = this.drag;
    let shift = [point[0] - start[0], point[1] - start[1]];
    if (sides.length === 4) {  // the whole box: it stays in the image
      shift = shift.map((each, axis) => Math.min(Math.max(each, -Math.max(from[axis], 0)), Math.max(1 - from[axis + 2], 0)));
    }
    if (!shift[0] && !shift[1]) return;
    const edges = from.map((edge, side) => sides.includes(side) ? edge + shift[side % 2] : edge);
    box.box = sides.length === 4 ? edges : sorted(edges);
    if (isNew && !this.boxes.includes(box)) { this.boxes.push(box); this.selected = box; }
    this.draw();
  }

  release() {
    if (!this.drag) return;
    const { box, from, isNew } = this.drag;
    const [width, height] = this.sides();
    const [left, top, right, bottom] = box.box;
    if ((right - left) * width < LEAST || (bottom - top) * height < LEAST) {
      if (isNew) { this.boxes = this.boxes.filter((each) => each !== box); this.selected = null; }
      else box.box = from;
    }
    this.drag = null;
    this.draw();
  }

  remove() {
    this.boxes = this.boxes.filter((box) => box !== this.selected);
    this.selected = null;
    this.draw();
  }

  relabel() {
    if (this.selected) Object.assign(this.selected, this.label());
    this.draw();
  }

  label() {
    return { number: Number(this.classes.value), color: this.scene.colors.length ? Number(this.colors.value) : null };
  }

  // Geometry

  sides() {
    return [this.canvas.clientWidth, this.canvas.clientHeight];
  }

  point(event) {
    const place = this.canvas.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width, y = (event.clientY - place.top) / place.height;
    return [x, y].map((each) => Math.min(Math.max(each, 0), 1));
  }

  at([x, y]) {  // the box at a point, the selected one first, and which of its sides a drag moves
    const [width, height] = this.sides();
    for (const box of [this.selected, ...[...this.boxes].reverse()].filter(Boolean)) {
      const near = box.box.map((edge, side) => side % 2 ? Math.abs(edge - y) * height : Math.abs(edge - x) * width);
      const corner = [near[0] < near[2] ? 0 : 2, near[1] < near[3] ? 1 : 3];
      if (box === this.selected && corner.every((side) => near[side] < HANDLE)) return { box, sides: corner };
      const [left, top, right, bottom] = box.box;
      if (left <= x && x <= right && top <= y && y <= bottom) return { box, sides: [0, 1, 2, 3] };
    }
    return { box: null, sides: [] };
  }

  isChanged(box) {
    const { id, ...now } = box, earlier = this.scene.regions[id];
    return !earlier || ["box", "number", "color"].some((key) => String(earlier[key]) !== String(now[key]));
  }

  // Drawing

  draw() {
    const [rows, columns] = this.scene.size, scale = window.devicePixelRatio || 1;
    this.canvas.style.aspectRatio = `${columns} / ${rows}`;
    const [width, height] = this.sides();
    if (!width || !height) return;  // in a tab that is not open
    Object.assign(this.canvas, { width: width * scale, height: height * scale });
    const ink = this.canvas.getContext("2d");
    ink.scale(scale, scale);
    ink.imageSmoothingEnabled = false;
    ink.fillStyle = "#808080";
    ink.fillRect(0, 0, width, height);
    if (this.picture) ink.drawImage(this.picture, 0, 0, width, height);
    const ids = new Set(this.boxes.filter((box) => !this.isChanged(box)).map((box) => box.id));
    this.scene.regions.forEach((region, id) => { if (!ids.has(id)) this.drawBox(ink, region, [4, 4]); });
    this.boxes.forEach((box) => this.drawBox(ink, box, []));
    this.removal.disabled = !this.selected;
    this.undo.disabled = ids.size === this.scene.regions.length && ids.size === this.boxes.length;
  }

  drawBox(ink, box, dashes) {  // dashed: where a box was that has changed
    const [width, height] = this.sides(), isNow = !dashes.length;
    const [left, top, right, bottom] = box.box.map((edge, side) => edge * (side % 2 ? height : width));
    const color = this.scene.colors.length ? this.scene.colors[box.color][1] : this.scene.class_colors[box.number];
    ink.setLineDash(dashes);
    for (const [style, thickness] of [["rgba(0, 0, 0, 0.7)", 4], [isNow ? color : "#fff", 2]]) {
      Object.assign(ink, { strokeStyle: style, lineWidth: thickness });
      ink.strokeRect(left, top, right - left, bottom - top);
    }
    if (!isNow) return;
    const name = this.scene.colors.length ? `${this.scene.colors[box.color][0]} ` : "";
    this.drawTag(ink, `${name}${this.scene.classes[box.number]}`, Math.max(left, 0), Math.max(top, 0));
    if (box !== this.selected) return;
    ink.setLineDash([]);
    for (const x of [left, right]) for (const y of [top, bottom]) {
      Object.assign(ink, { fillStyle: "#fff", strokeStyle: "#000", lineWidth: 1 });
      ink.fillRect(x - 4, y - 4, 8, 8);
      ink.strokeRect(x - 4, y - 4, 8, 8);
    }
  }

  drawTag(ink, text, left, top) {
    ink.font = "12px system-ui, sans-serif";
    const across = ink.measureText(text).width + 8, x = Math.min(left, Math.max(this.sides()[0] - across, 0));
    ink.fillStyle = "rgba(0, 0, 0, 0.7)";
    ink.fillRect(x, top, across, 17);
    ink.fillStyle = "#fff";
    ink.fillText(text, x + 4, top + 12.5);
  }
}

function sorted([left, top, right, bottom]) {  // a corner may be drawn past the opposite one
  return [Math.min(left, right), Math.min(top, bottom), Math.max(left, right), Math.max(top, bottom)];
}

customElements.define("layout-canvas", LayoutCanvas);
