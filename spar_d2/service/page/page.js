// The page: reads the form, asks the service, shows the results.

import { Picture, percent } from "./picture.js";
import { Refused, segment, send } from "./service.js";

const at = (id) => document.getElementById(id);
const single = new Picture(at("single"), "Single pass");
const sliding = new Picture(at("window"), "Sliding window");
const pictures = [single, sliding];
let settings, file, running;

async function start() {
  const response = await fetch("/settings").catch(() => null);
  if (!response?.ok) return fail("The service does not answer. Is it still running?");
  settings = await response.json();
  at("about").textContent = `${settings.encoder} on ${settings.device}`;
  for (const [name, count] of Object.entries(settings.vocabularies)) {
    at("vocabulary").add(new Option(`${name} (${count} classes)`, name));
  }
  if (settings.words.length) at("words").placeholder = settings.words.slice(0, 12).join("; ");
  if (settings.anyup) {
    for (const steps of ["anyup", "anyup,lposs+"]) at("refine").add(new Option(steps.replace(",", ", "), steps));
  }
}

function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  at("file-name").textContent = `${chosen.name} (${megabytes(chosen.size)} MB)`;
  URL.revokeObjectURL(at("preview").src);
  at("preview").src = URL.createObjectURL(chosen);
  at("preview").hidden = false;
  fail("");
}

/** The upload and its pixels. A file is sent as it is, unless it is larger than the chosen side. */
async function prepare() {
  const image = await createImageBitmap(file).catch(() => null);
  const side = Number(at("side").value);
  const scale = image && side ? side / Math.max(image.width, image.height) : 1;
  if (scale >= 1) return { upload: file, image };
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return { upload: new File([blob], "image.png"), image: canvas };
}

async function run(event) {
  event.preventDefault();
  if (!file) return fail("Choose a photo first.");
  const words = at("vocabulary").value || at("words").value.trim();
  if (!words && !settings?.words.length) return fail("Name at least one class, such as: cat, kitten; dog; sky.");
  running?.abort();
  const { signal } = (running = new AbortController());
  fail("");
  at("go").setAttribute("aria-busy", "true");
  try {
    await ask(words, signal);
    say("");
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Refused)) console.error(error);
    fail(error instanceof Refused ? error.message : "This browser failed to show the result.");
    say("");
  }
  if (running.signal === signal) at("go").setAttribute("aria-busy", "false");
}

async function ask(words, signal) {
  say("Reading the photo ...");
  const { upload, image } = await prepare();
  const most = settings.limits.max_bytes;
  if (upload.size > most) {
    throw new Refused(`The file has ${megabytes(upload.size)} MB; the service takes at most ${megabytes(most)} MB.`);
  }
  const fields = {
    image: upload,
    words,
    refine: at("refine").value,
    prob_threshold: Number(at("prob").value) || "",
    area_threshold: Number(at("area").value) || "",
    logit_scale: at("scale").value,
  };
  say("Segmenting ...");
  const record = await segment(fields, signal);
  single.show(record, image, seconds(record));
  at("window").hidden = at("pca").hidden = true;
  at("empty").hidden = true;
  at("shown").hidden = false;
  at("size").textContent = `${record.width} x ${record.height} pixels`;
  list(record.classes);
  if (matchMedia("(max-width: 52rem)").matches) at("result").scrollIntoView({ block: "start" });
  if (at("features").checked) {
    say("Computing features ...");
    const picture = at("pca").querySelector("img");
    const response = await send("/features", { image: upload }, signal);
    URL.revokeObjectURL(picture.src);
    picture.src = URL.createObjectURL(await response.blob());
    picture.style.maxWidth = `calc(75vh * ${record.width / record.height})`;
    at("pca").hidden = false;
  }
  if (at("sliding").checked) {
    say("Sliding window ...");
    const other = await segment({ ...fields, inference: "sliding_window" }, signal);
    const times = other.seconds / record.seconds;
    const names = new Set(record.classes.map((one) => one.number));
    const more = other.classes.filter((one) => !names.has(one.number));
    list([...record.classes, ...more.map((one) => ({ ...one, area: 0 }))]);
    sliding.show(other, image, `${seconds(other)}, ${times.toFixed(1)} times as long`);
  }
}

function megabytes(bytes) {
  return (bytes / 2 ** 20).toLocaleString("en", { maximumSignificantDigits: 2 });
}

function seconds(record) {
  const words = record.word_seconds >= 0.05 ? ` (+ ${record.word_seconds.toFixed(1)} s for new words)` : "";
  return `${record.seconds.toPrecision(2)} s${words}`;
}

/** List the classes. A press on one shows only that class. */
function list(classes) {
  at("legend").replaceChildren(
    ...classes.map(({ number, name, area, color }) => {
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.innerHTML =
        '<svg width="14" height="14" aria-hidden="true"><circle cx="7" cy="7" r="7"/></svg>' +
        '<span class="name"></span> <span class="area"></span>';
      button.querySelector("circle").setAttribute("fill", `rgb(${color.join(",")})`);
      button.querySelector(".name").textContent = name || "(no name)";
      button.querySelector(".area").textContent = percent(area);
      button.addEventListener("click", () => highlight(button, number));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

function highlight(button, number) {
  const on = button.getAttribute("aria-pressed") === "false";
  for (const other of at("legend").querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(on));
  for (const picture of pictures) if (!picture.figure.hidden) picture.color(on ? number : null);
}

function say(sentence) {
  at("status").textContent = sentence;
}

function fail(sentence) {
  at("error").textContent = sentence;
  at("error").hidden = !sentence;
}

at("form").addEventListener("submit", run);
at("file").addEventListener("change", () => choose(at("file").files[0]));
at("preview").addEventListener("error", () => (at("preview").hidden = true));
at("vocabulary").addEventListener("change", () => (at("own").hidden = at("vocabulary").value !== ""));
at("opacity").addEventListener("input", () => pictures.forEach((picture) => picture.draw(Number(at("opacity").value))));
for (const name of ["prob", "area"]) {
  at(name).addEventListener("input", () => (at(`${name}-value`).textContent = at(name).value));
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}
start();
