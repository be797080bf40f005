// The page: photos in, colored classes out. worker.js runs the model.

import { readClasses } from "./names.js";

const $ = (id) => document.getElementById(id);
const MOST_PIXELS = 100e6, MOST_BYTES = 100e6;
const worker = new Worker(`worker.js${location.search}`, { type: "module" });
const waiting = new Map();
// photo: what is segmented next. typed: classes that are read next. scored: what the worker has scores of.
// result: what is shown, with all that belongs to it.
let model, photo, typed, scored, result, tasks = 0, opened = 0, isChanged = false, isWorking = false;

worker.onmessage = ({ data }) => {
  if (data.id === undefined) return showProgress(data);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  data.error ? reject(new Error(data.error)) : resolve(data);
};
worker.onerror = (event) => say(`The model cannot be started: ${event.message || "worker.js failed"}.`, true);

/** Ask the worker for a task; resolves to its answer. */
function ask(task, values = {}, transfer = []) {
  const id = ++tasks;
  worker.postMessage({ id, task, ...values }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

function say(message, isError = false) {
  $("status").textContent = message;
  $("status").classList.toggle("error", isError);
}

function showProgress({ progress, name }) {
  say(`Loading ${name} …`);
  if (progress === null) $("progress").removeAttribute("value");
  else $("progress").value = progress;
}

async function start() {
  try {
    model = await ask("load");
  } catch (error) {
    $("progress").hidden = true;
    return say(`The model cannot be loaded: ${error.message}`, true);
  }
  $("progress").hidden = true;
  $("file").disabled = false;
  const { origin, version, device } = model;
  $("about").textContent = `Model: ${origin.encoder || "?"}, ${origin.pretrained || "?"}. spar_d2 ${version}, ${device}.`;
  $("words").hidden = !model.hasWords;
  listClasses();
  say("Ready: choose a photo.");
}

function listClasses() {
  $("classes").replaceChildren(
    ...model.classes.map(({ name, synonyms, color }, number) => {
      const label = document.createElement("label"), box = document.createElement("input");
      box.type = "checkbox";
      box.checked = synonyms.length > 0;
      box.disabled = synonyms.length === 0;
      box.value = number;
      box.addEventListener("change", update);
      label.title = synonyms.join(", ");
      label.append(box, chip(color), name);
      return label;
    }),
  );
}

function chip(color) {
  const element = document.createElement("span");
  element.className = "chip";
  element.style.backgroundColor = `rgb(${color})`;
  return element;
}

const boxes = () => [...$("classes").querySelectorAll("input:not(:disabled)")];
const chosen = () => boxes().filter((box) => box.checked).map((box) => Number(box.value));

async function open(file) {
  if (!file) return;
  const turn = ++opened;
  // The picture of another photo must not be saved under the name of this one.
  photo = undefined;
  clear();
  if (file.size > MOST_BYTES) return say(`${file.name} has more than ${MOST_BYTES / 1e6} MB; choose a smaller photo.`, true);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (turn === opened) say(`${file.name} is not an image that this browser can read.`, true);
    return;
  }
  if (turn !== opened) return; // a later photo
  if (bitmap.width * bitmap.height > MOST_PIXELS)
    return say(`${file.name} has more than ${MOST_PIXELS / 1e6} million pixels; choose a smaller photo.`, true);
  photo = { bitmap, name: file.name.replace(/\.[^.]*$/, "") };
  await update();
}

/** The size in pixels to which a photo is resized: as chosen, and small enough for the memory of a browser. */
function sizeOf(bitmap) {
  const side = Number($("side").value), { width, height } = bitmap;
  let scale = side ? side / Math.min(width, height) : 1;
  const patches = (s) => Math.ceil((width * s) / model.patch) * Math.ceil((height * s) / model.patch);
  while (patches(scale) > model.mostPatches) scale *= 0.98;
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** After every change of photo, classes or settings: one step after another, until the picture is up to date. */
async function update() {
  isChanged = true;
  if (isWorking) return;
  isWorking = true;
  try {
    while (isChanged) {
      isChanged = false;
      if (typed && !(await rename())) continue;
      if (photo) await segment();
    }
  } finally {
    isWorking = false;
  }
}

/** Use the typed classes; resolves to whether that worked. */
async function rename() {
  const classes = typed;
  typed = undefined;
  say("Reading the names …");
  try {
    model.classes = (await ask("name", { classes })).classes;
  } catch (error) {
    say(`The names cannot be used: ${error.message}`, true);
    return false;
  }
  // The labels of the last picture have other numbers.
  clear();
  listClasses();
  say(`${model.classes.length} classes.`);
  return true;
}

/** Compute what the picture lacks: scores for another photo, size or vocabulary; and labels of the chosen classes. */
async function segment() {
  if (!chosen().length) return say("Choose at least one class.", true);
  const source = photo, { classes } = model, [width, height] = sizeOf(source.bitmap), wanted = { source, classes, width, height };
  let message;
  try {
    if (!scored || Object.keys(wanted).some((key) => scored[key] !== wanted[key])) {
      scored = undefined;
      const { canvas, pixels } = resize(source.bitmap, width, height);
      say(`Segmenting ${width}×${height} pixels …`);
      const { seconds } = await ask("segment", { image: pixels, width, height });
      scored = { ...wanted, canvas };
      const resized = width !== source.bitmap.width ? `, resized from ${source.bitmap.width}×${source.bitmap.height}` : "";
      message = `${width}×${height} pixels in ${seconds.toFixed(2)} s${resized}.`;
    }
    // Meanwhile, there may be another photo, or other classes may be chosen.
    const numbers = chosen();
    if (source !== photo || !numbers.length) return;
    const labeled = await ask("relabel", { chosen: numbers });
    if (source !== photo) return;
    result = { ...scored, labels: labeled.labels, best: labeled.best };
    say(message ?? `${width}×${height} pixels, ${numbers.length} classes.`);
    draw();
  } catch (error) {
    if (source !== photo) return;
    clear();
    say(`The photo cannot be segmented: ${error.message}. Try a smaller short side.`, true);
  }
}

/** A photo at a size: its canvas and pixels. What is transparent becomes white, as in Python. */
function resize(bitmap, width, height) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return { canvas, pixels: context.getImageData(0, 0, width, height).data };
}

/** Show no picture. */
function clear() {
  result = undefined;
  $("canvas").hidden = $("pointer").hidden = true;
  $("save-labels").disabled = $("save-picture").disabled = true;
  $("found").replaceChildren();
}

function draw() {
  const { width, height, labels, canvas, classes } = result, target = $("canvas"), opacity = $("opacity").value / 100;
  const context = canvas.getContext("2d"), pixels = context.getImageData(0, 0, width, height);
  const counts = new Uint32Array(classes.length);
  for (let i = 0; i < labels.length; i++) {
    const color = classes[labels[i]].color;
    counts[labels[i]]++;
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] += (color[c] - pixels.data[4 * i + c]) * opacity;
  }
  Object.assign(target, { width, height, hidden: false });
  target.getContext("2d").putImageData(pixels, 0, 0);
  $("save-labels").disabled = $("save-picture").disabled = false;
  listFound(counts);
}

function listFound(counts) {
  const { classes } = result, total = counts.reduce((sum, count) => sum + count, 0);
  const found = [...counts.keys()].filter((k) => counts[k]).sort((a, b) => counts[b] - counts[a]);
  $("found").replaceChildren(
    ...found.map((k) => {
      const item = document.createElement("li");
      item.append(chip(classes[k].color), `${classes[k].name} ${((100 * counts[k]) / total).toFixed(1)} %`);
      return item;
    }),
  );
}

function point(event) {
  const { left, top, width, height } = $("canvas").getBoundingClientRect(), shown = $("pointer");
  const x = Math.floor(((event.clientX - left) / width) * result.width);
  const y = Math.floor(((event.clientY - top) / height) * result.height);
  shown.hidden = x < 0 || y < 0 || x >= result.width || y >= result.height;
  if (shown.hidden) return;
  const pixel = y * result.width + x;
  shown.textContent = `${result.classes[result.labels[pixel]].name} ${result.best[pixel].toFixed(3)}`;
  const right = event.clientX - left > width / 2;
  shown.style.left = right ? "auto" : `${event.clientX - left + 14}px`;
  shown.style.right = right ? `${$("canvas").parentElement.clientWidth - (event.clientX - left) + 14}px` : "auto";
  shown.style.top = `${Math.max(event.clientY - top - 12, 0)}px`;
}

/** The labels as a gray PNG: class k has the value k. With more than 256 classes, red is the high byte. */
function labelPicture() {
  const { width, height, labels, classes } = result, canvas = new OffscreenCanvas(width, height);
  const pixels = new ImageData(width, height), isWide = classes.length > 256;
  labels.forEach((k, i) => pixels.data.set(isWide ? [k >> 8, k & 255, 0, 255] : [k, k, k, 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

async function save(blob, suffix) {
  const link = document.createElement("a"), { name } = result.source;
  link.href = URL.createObjectURL(await blob);
  link.download = `${name}_${suffix}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

$("file").addEventListener("change", (event) => open(event.target.files[0]));
$("side").addEventListener("change", update);
$("opacity").addEventListener("input", () => result && draw());
$("all").addEventListener("click", () => { boxes().forEach((box) => (box.checked = true)); update(); });
$("none").addEventListener("click", () => { boxes().forEach((box) => (box.checked = false)); update(); });
$("filter").addEventListener("input", ({ target }) => {
  for (const label of $("classes").children)
    label.hidden = !`${label.textContent} ${label.title}`.toLowerCase().includes(target.value.toLowerCase());
});
$("words").addEventListener("submit", (event) => {
  event.preventDefault();
  const classes = readClasses($("names").value);
  if (!classes.length) return say("Type at least one class.", true);
  typed = classes;
  update();
});
$("canvas").addEventListener("pointermove", (event) => result && point(event));
$("canvas").addEventListener("pointerleave", () => ($("pointer").hidden = true));
$("save-labels").addEventListener("click", () => save(labelPicture(), "labels"));
$("save-picture").addEventListener("click", () => save(new Promise((done) => $("canvas").toBlob(done)), "segmented"));
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop" && model) open(event.dataTransfer.files[0]);
  });
// For tests and the console.
window.segmented = () => result && { width: result.width, height: result.height, labels: [...result.labels] };
start();
