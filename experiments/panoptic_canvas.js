// <panoptic-canvas>: paints a panoptic map, for the tab "Panoptic" of the demo page (panoptic_page.py).
//
// `PanopticCanvas.show(scene)` shows a map and its regions, if need be when the tab is opened; `painting` of the element
// is the JSON of the map as it is now. The map has the pixels of the images: each has the number of its region, from 1,
// or 0 where nothing is painted, without soft edges. A region is an instance of a thing, or all of a stuff class.

const MOST_UNDONE = 20;  // strokes that can be undone
const PAINT_STYLE = `
  :host { display: block; max-width: 480px; font-size: 14px; }
  canvas { display: block; width: 100%; border-radius: 6px; touch-action: none; cursor: crosshair;
           border: 1px solid var(--border-color-primary, #ccc); }
  .tools, li { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin-top: 8px; }
  select, button, input { font: inherit; padding: 4px 10px; border-radius: 6px; color: var(--body-text-color, #222);
                          border: 1px solid var(--border-color-primary, #ccc);
                          background: var(--input-background-fill, #fff); }
  input[type=text] { flex: 1; min-width: 120px; }
  button { cursor: pointer; }
  ul { list-style: none; margin: 8px 0 0; padding: 0; max-height: 220px; overflow: auto; }
  li { flex-wrap: nowrap; margin: 0; padding: 3px 4px; border-radius: 6px; }
  li[aria-current=true] { background: var(--background-fill-secondary, #eee); }
  li > button:first-child { flex: none; display: flex; gap: 8px; align-items: center; border: none; background: none; }
  .swatch { width: 14px; height: 14px; border: 1px solid #000; }
  :disabled { opacity: 0.45; cursor: default; }
`;

class PanopticCanvas extends HTMLElement {
  static latest = null;  // the scene to show

  static show(scene) {
    if (!scene) return;  // of a model that reads no segments
    PanopticCanvas.latest = scene;
    document.querySelector("panoptic-canvas")?.show(scene);
  }

  constructor() {
    super();
    this.scene = { key: null, size: [1, 1], runs: [[0, 1]], regions: [], classes: [], things: [], class_colors: [] };
    this.ids = new Uint16Array(1);  // of each pixel the number of its region; 0: none
    this.regions = [];  // region k + 1: {number, words}, null once it is removed
    this.selected = null;  // the index of the region that the brush paints
    this.undone = [];  // what there was before each stroke
    this.last = null;  // the point of the stroke that is being drawn
    this.attachShadow({ mode: "open" }).innerHTML = `<style>${PAINT_STYLE}</style>
      <canvas aria-label="panoptic map"></canvas>
      <div class="tools">
        <select aria-label="class to paint"></select>
        <button type="button" aria-label="new instance">new instance</button>
        <select aria-label="tool">
          <option value="brush">brush</option><option value="fill">fill</option><option value="eraser">eraser</option>
        </select>
        <label>size <input type="range" min="1" value="1" aria-label="size of the brush"></label>
        <button type="button" aria-label="undo the last stroke">undo</button>
        <button type="button" aria-label="save the picture of the map">save picture</button>
      </div>
      <ul aria-label="regions"></ul>`;
    this.canvas = this.shadowRoot.querySelector("canvas");
    this.list = this.shadowRoot.querySelector("ul");
    [this.classes, this.tool] = this.shadowRoot.querySelectorAll("select");
    [this.instance, this.back, this.saving] = this.shadowRoot.querySelectorAll(".tools button");
    this.width = this.shadowRoot.querySelector("input[type=range]");
    this.listen();
  }

  connectedCallback() {
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    if (PanopticCanvas.latest) this.show(PanopticCanvas.latest);
    this.draw();
  }

  // The page

  show(scene) {
    if (scene.key === this.scene.key) return;  // it is on the canvas already, perhaps painted over
    const [rows, columns] = scene.size;
    if (JSON.stringify([scene.classes, scene.size]) !== JSON.stringify([this.scene.classes, this.scene.size])) {
      this.classes.replaceChildren(...scene.classes.map((name, number) => new Option(name, number)));
      this.width.max = Math.ceil(Math.max(rows, columns) / 2);
      this.width.value = Math.ceil(Math.max(rows, columns) / 8);
    }
    this.scene = scene;
    this.ids = new Uint16Array(rows * columns);
    let start = 0;
    for (const [id, length] of scene.runs) { this.ids.fill(id, start, start + length); start += length; }
    this.regions = scene.regions.map((region) => region && { ...region });
    this.selected = null;
    this.undone = [];
    this.refresh();
  }

  get painting() {
    const runs = [];
    for (const id of this.ids) {
      if (runs.length && runs.at(-1)[0] === id) runs.at(-1)[1] += 1;
      else runs.push([id, 1]);
    }
    return JSON.stringify({ size: this.scene.size, runs, regions: this.regions });
  }

  // The user

  listen() {
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => this.release());
    this.classes.addEventListener("change", () => this.choose());
    this.instance.addEventListener("click", () => this.add());
    this.back.addEventListener("click", () => this.undo());
    this.saving.addEventListener("click", () => this.save());
  }

  choose() {  // goes on with the last region of the class, if there is one
    this.selected = this.regions.findLastIndex((region) => region?.number === Number(this.classes.value));
    if (this.selected < 0) this.selected = null;
    this.refresh();
  }

  add() {
    const number = Number(this.classes.value);
    const own = this.scene.things[number] ? -1 : this.regions.findLastIndex((region) => region?.number === number);
    this.selected = own < 0 ? this.regions.push({ number, words: "" }) - 1 : own;  // stuff has one region
    this.refresh();
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.keep();
    if (this.tool.value !== "eraser" && this.selected === null) this.add();
    const point = this.point(event), id = this.tool.value === "eraser" ? 0 : this.selected + 1;
    if (this.tool.value === "fill") this.fill(point.map(Math.floor), id);
    else { this.last = point; this.stroke(point, point, id); }
    this.refresh();
  }

  move(event) {
    if (!this.last) return;
    const point = this.point(event);
    this.stroke(this.last, point, this.tool.value === "eraser" ? 0 : this.selected + 1);
    this.last = point;
    this.draw();
  }

  release() {
    this.last = null;
    this.refresh();
  }

  keep() {
    this.undone.push([this.ids.slice(), [...this.regions], this.selected]);  // not copies of regions: words stay
    if (this.undone.length > MOST_UNDONE) this.undone.shift();
  }

  undo() {
    [this.ids, this.regions, this.selected] = this.undone.pop();
    this.refresh();
  }

  remove(index) {
    this.keep();
    this.ids = this.ids.map((id) => id === index + 1 ? 0 : id);
    this.regions[index] = null;
    if (this.selected === index) this.selected = null;
    this.refresh();
  }

  save() {  // in the colours of the classes, as the page opens them again
    const link = document.createElement("a");
    link.download = "map.png";
    link.href = this.paint((region) => this.scene.class_colors[region.number]).toDataURL("image/png");
    link.click();
  }

  // Pixels

  point(event) {  // in pixels of the map
    const place = this.canvas.getBoundingClientRect(), [rows, columns] = this.scene.size;
    const x = (event.clientX - place.left) / place.width, y = (event.clientY - place.top) / place.height;
    return [x * columns, y * rows];
  }

  stroke(start, end, id) {
    const steps = 1 + Math.ceil(2 * Math.hypot(end[0] - start[0], end[1] - start[1]));
    for (let i = 0; i <= steps; i++) {
      this.stamp(...start.map((each, axis) => each + (end[axis] - each) * i / steps), id);
    }
  }

  stamp(x, y, id) {  // the pixels whose centres are in a disc, and that at its centre
    const [rows, columns] = this.scene.size, radius = this.width.value / 2;
    const centre = [Math.floor(x), Math.floor(y)];
    for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(rows, y + radius + 1); row++) {
      for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(columns, x + radius + 1); column++) {
        const inside = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius;
        if (inside || (column === centre[0] && row === centre[1])) this.ids[row * columns + column] = id;
      }
    }
  }

  fill([x, y], id) {  // the connected pixels of one region, or of none
    const [rows, columns] = this.scene.size, old = this.ids[y * columns + x], open = [[x, y]];
    if (old === id) return;
    while (open.length) {
      const [column, row] = open.pop();
      if (column < 0 || row < 0 || column >= columns || row >= rows || this.ids[row * columns + column] !== old) continue;
      this.ids[row * columns + column] = id;
      open.push([column + 1, row], [column - 1, row], [column, row + 1], [column, row - 1]);
    }
  }

  // Drawing

  refresh() {
    if (this.selected !== null) this.classes.value = this.regions[this.selected].number;
    const number = Number(this.classes.value);
    this.instance.disabled = !this.scene.things[number];
    this.back.disabled = !this.undone.length;
    this.list.replaceChildren(...this.regions.map((region, index) => region && this.item(region, index)).filter(Boolean));
    this.draw();
  }

  item(region, index) {
    const item = document.createElement("li"), choice = document.createElement("button");
    const name = this.scene.classes[region.number];
    item.setAttribute("aria-current", index === this.selected);
    choice.type = "button";
    choice.setAttribute("aria-label", `paint region ${index + 1}`);
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = `rgb(${this.shade(region, index)})`;
    choice.append(swatch, name);
    choice.addEventListener("click", () => { this.selected = index; this.refresh(); });
    item.append(choice);
    if (this.scene.words) {
      const words = document.createElement("input");
      Object.assign(words, { type: "text", value: region.words, placeholder: name });
      words.setAttribute("aria-label", `words of region ${index + 1}`);
      words.addEventListener("input", () => { region.words = words.value; });
      item.append(words);
    }
    const removal = document.createElement("button");
    Object.assign(removal, { type: "button", textContent: "remove" });
    removal.setAttribute("aria-label", `remove region ${index + 1}`);
    removal.addEventListener("click", () => this.remove(index));
    item.append(removal);
    return item;
  }

  shade(region, index) {  // that of the class; further instances of it are darker and lighter in turn
    const earlier = this.regions.slice(0, index).filter((each) => each?.number === region.number).length;
    const towards = earlier % 2 ? 0 : 255, share = Math.min(0.6, 0.2 * Math.ceil(earlier / 2 + earlier % 2));
    return this.scene.class_colors[region.number].map((level) => Math.round(level + share * (towards - level)));
  }

  paint(color) {  // a canvas of the pixels of the map, in colours [red, green, blue] of regions
    const [rows, columns] = this.scene.size, picture = document.createElement("canvas");
    Object.assign(picture, { width: columns, height: rows });
    const ink = picture.getContext("2d"), pixels = ink.createImageData(columns, rows);
    const colors = [[128, 128, 128], ...this.regions.map((region, index) => region && color(region, index))];
    this.ids.forEach((id, place) => pixels.data.set([...colors[id], 255], 4 * place));
    ink.putImageData(pixels, 0, 0);
    return picture;
  }

  draw() {
    const [rows, columns] = this.scene.size, scale = window.devicePixelRatio || 1;
    this.canvas.style.aspectRatio = `${columns} / ${rows}`;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width || !height) return;  // in a tab that is not open
    Object.assign(this.canvas, { width: width * scale, height: height * scale });
    const ink = this.canvas.getContext("2d");
    ink.imageSmoothingEnabled = false;
    ink.drawImage(this.paint((region, index) => this.shade(region, index)), 0, 0, width * scale, height * scale);
  }
}

customElements.define("panoptic-canvas", PanopticCanvas);
