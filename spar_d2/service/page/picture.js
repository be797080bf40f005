// A segmentation over its image, with the class under the pointer and downloads.

import { labelPng } from "./png.js";

const tip = document.getElementById("tip");
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** A figure with the result of one inference mode. */
export class Picture {
  constructor(figure, title) {
    this.figure = figure;
    this.title = title;
    this.opacity = 0.55;
    this.only = null;
    figure.innerHTML =
      '<figcaption><strong></strong><span></span></figcaption><canvas tabindex="0" role="img"></canvas>' +
      '<div class="downloads"><button type="button">Label map (PNG)</button>' +
      '<button type="button">Overlay (PNG)</button></div>';
    figure.querySelector("strong").textContent = title;
    this.canvas = figure.querySelector("canvas");
    const [labels, overlay] = figure.querySelectorAll("button");
    labels.addEventListener("click", async () => save(await this.labelMap(), "labels.png"));
    overlay.addEventListener("click", () => this.canvas.toBlob((blob) => save(blob, "overlay.png")));
    this.canvas.addEventListener("pointermove", (event) => this.point(event.clientX, event.clientY));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event.clientX, event.clientY));
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("keydown", (event) => this.press(event));
    this.canvas.addEventListener("blur", () => this.leave());
  }

  /** Show a record of the service over an image (or on white without one). */
  show(record, image, time) {
    Object.assign(this, { record, image, only: null, place: null });
    Object.assign(this.canvas, { width: record.width, height: record.height });
    // Not higher than the window.
    this.canvas.style.maxWidth = `calc(75vh * ${record.width / record.height})`;
    this.classes = new Map(record.classes.map((one) => [one.number, one]));
    const shares = record.classes.slice(0, 8).map((one) => `${one.name} ${percent(one.area)}`);
    this.canvas.setAttribute("aria-label", `${this.title}: ${shares.join(", ")}. Arrow keys name the class at a point.`);
    this.figure.querySelector("figcaption span").textContent = time;
    this.figure.hidden = false;
    this.color();
  }

  /** Color the classes, or only one of them, and draw. */
  color(only = this.only) {
    this.only = only;
    const { width, height, labels } = this.record;
    const fill = new ImageData(width, height);
    const lines = new ImageData(width, height);
    const values = new Uint32Array(fill.data.buffer);
    const edges = new Uint32Array(lines.data.buffer);
    const palette = new Map([...this.classes].map(([number, one]) => [number, this.shade(one)]));
    for (let y = 0, at = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at++) {
        const label = labels[at];
        values[at] = palette.get(label);
        const edge = (x + 1 < width && labels[at + 1] !== label) || (y + 1 < height && labels[at + width] !== label);
        if (edge) edges[at] = 0xd0ffffff;
      }
    }
    this.fill = canvasOf(fill);
    this.lines = canvasOf(lines);
    this.draw();
  }

  shade({ number, name, color: [red, green, blue] }) {
    // As in pictures of spar-d2 segment, the background is drawn without color.
    const hidden = this.only === null ? name.trim().toLowerCase() === "background" : number !== this.only;
    return hidden ? 0 : ((0xff << 24) | (blue << 16) | (green << 8) | red) >>> 0;
  }

  draw(opacity = this.opacity) {
    this.opacity = opacity;
    if (!this.record) return;
    const { width, height } = this.record;
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 1;
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    if (this.image) context.drawImage(this.image, 0, 0, width, height);
    context.globalAlpha = opacity;
    context.drawImage(this.fill, 0, 0);
    context.globalAlpha = Math.min(1, 1.5 * opacity);
    context.drawImage(this.lines, 0, 0);
  }

  labelMap() {
    return labelPng(this.record.labels, this.record.width, this.record.height);
  }

  /** Name the class at a point of the window. */
  point(left, top) {
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.record;
    const x = Math.min(width - 1, Math.max(0, Math.floor(((left - box.left) / box.width) * width)));
    const y = Math.min(height - 1, Math.max(0, Math.floor(((top - box.top) / box.height) * height)));
    this.place = [x, y];
    const index = y * width + x;
    const { name } = this.classes.get(this.record.labels[index]);
    const score = this.record.scoreAt(index).toFixed(3);
    tip.textContent = `${name || "(no name)"}: score ${score}`;
    tip.title = "cosine similarity of patch and class name";
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(left + 14, room))}px`;
    tip.style.top = `${top > 60 ? top - tip.offsetHeight - 12 : top + 20}px`;
  }

  press(event) {
    const step = STEPS[event.key];
    if (event.key === "Escape") this.leave();
    if (!step) return;
    event.preventDefault();
    const { width, height } = this.record;
    const [x, y] = this.place ?? [width / 2, height / 2];
    const stride = Math.max(1, Math.round(Math.max(width, height) / 64));
    const box = this.canvas.getBoundingClientRect();
    this.point(
      box.left + ((x + step[0] * stride + 0.5) / width) * box.width,
      box.top + ((y + step[1] * stride + 0.5) / height) * box.height,
    );
    this.mark();
  }

  /** Draw a cross at the point that arrow keys have reached. */
  mark() {
    this.draw();
    const context = this.canvas.getContext("2d");
    const size = Math.max(4, this.record.width / 50);
    for (const [style, width] of [["#000", size / 3], ["#fff", size / 8]]) {
      Object.assign(context, { globalAlpha: 1, strokeStyle: style, lineWidth: width });
      const [x, y] = this.place;
      context.beginPath();
      context.moveTo(x - size, y);
      context.lineTo(x + size, y);
      context.moveTo(x, y - size);
      context.lineTo(x, y + size);
      context.stroke();
    }
    document.getElementById("status").textContent = tip.textContent;
  }

  leave() {
    tip.hidden = true;
    if (this.place) this.draw();
  }
}

export function percent(share) {
  return share >= 0.0995 ? `${Math.round(100 * share)} %` : `${(100 * share).toPrecision(2)} %`;
}

function canvasOf(pixels) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: pixels.width, height: pixels.height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
