// Runs the model beside the page, which stays responsive.
import { labelPixels } from "./labels.js";

let ort, session, model, text, kept, words, last;

// One task after another: labels must not be those of another photo's scores.
self.onmessage = ({ data }) => (last = Promise.resolve(last).then(() => work(data)));

async function work(data) {
  try {
    self.postMessage({ id: data.id, ...(await { load, segment, relabel, name }[data.task](data)) });
  } catch (error) {
    self.postMessage({ id: data.id, error: error.message || String(error) });
  }
}

async function load() {
  model = await (await file("model.json")).json();
  const bytes = Uint8Array.from(atob(model.text), (letter) => letter.charCodeAt(0));
  text = new Float32Array(bytes.buffer);
  const weights = new Uint8Array(await download("model.onnx"));
  let device = "WebAssembly";
  if (await usesGPU()) {
    try {
      await start(weights, "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm.gz", "webgpu");
      await run(new Float32Array(3 * 32 * 32), 32, 32);
      device = "WebGPU";
    } catch (error) {
      console.warn("WebGPU does not work, using WebAssembly:", error);
      session = null;
    }
  }
  if (!session) await start(weights, "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm.gz", "wasm");
  const { classes, patch_size, most_patches, origin, version, tokens } = model;
  return { classes, patch: patch_size, mostPatches: most_patches, origin, version, device, hasWords: Boolean(tokens) };
}

/** Whether to try WebGPU: "?device=webgpu" and "?device=wasm" in the address of the page decide, else the browser. */
async function usesGPU() {
  const wish = new URLSearchParams(self.location.search).get("device");
  const adapter = wish !== "wasm" && (await navigator.gpu?.requestAdapter().catch(() => null));
  if (!adapter) return false;
  // A GPU in software is slower than WebAssembly.
  return wish === "webgpu" || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
}

async function start(weights, script, binary, provider) {
  ort = await import(`./${script}`);
  ort.env.wasm.wasmBinary = await unzipped(await download(binary));
  // Threads need headers that a plain static server does not send.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
  session = await ort.InferenceSession.create(weights, { executionProviders: [provider] });
}

/** Scores of a photo, which {@link relabel} uses. */
async function segment({ image, width, height }) {
  const started = performance.now();
  // RGBA, row by row, to three planes.
  const planes = new Float32Array(3 * width * height);
  for (let pixel = 0; pixel < width * height; pixel++)
    for (let channel = 0; channel < 3; channel++)
      planes[channel * width * height + pixel] = image[4 * pixel + channel];
  const { scores } = await run(planes, width, height);
  kept = { scores: scores.data.slice(), shape: scores.dims.slice(1), width, height };
  scores.dispose?.();
  return { seconds: (performance.now() - started) / 1000 };
}

function run(planes, width, height) {
  const names = text.length / model.embed_dim;
  return session.run({
    image: new ort.Tensor("float32", planes, [1, 3, height, width]),
    text: new ort.Tensor("float32", text, [names, model.embed_dim]),
  });
}

function relabel({ chosen }) {
  const { scores, shape, width, height } = kept;
  return labelPixels(scores, shape, model.query_class, new Set(chosen), model.patch_size, width, height);
}

/** Other classes, by their names and synonyms: the embedding of a name is the mean over all prompt templates. */
async function name({ classes }) {
  words ??= await loadWords();
  const names = classes.flatMap(({ synonyms }) => synonyms), texts = classes.flatMap((one) => one.texts), size = model.embed_dim;
  const found = new Float32Array(names.length * size);
  for (const [index, wording] of texts.entries()) {
    const prompts = model.templates.map((template) => template.replace("{}", () => wording));
    const vector = found.subarray(index * size, (index + 1) * size);
    const vectors = await embed(prompts);
    for (let i = 0; i < vectors.length; i++) vector[i % size] += vectors[i];
    const length = Math.hypot(...vector);
    vector.forEach((value, i) => (vector[i] = value / length));
    self.postMessage({ progress: (index + 1) / names.length, name: names[index] });
  }
  text = found;
  model.classes = classes.map(({ name, synonyms }, k) => ({ name, synonyms, color: model.colors[k % model.colors.length] }));
  model.query_class = classes.flatMap(({ synonyms }, k) => synonyms.map(() => k));
  return { classes: model.classes };
}

async function loadWords() {
  const [{ Tokenizer }, packed, weights] = await Promise.all([
    import("./tokenizers.min.mjs"), download("tokenizer.json.gz"), download("text.onnx"),
  ]);
  const settings = JSON.parse(new TextDecoder().decode(await unzipped(packed)));
  const session = await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: ["wasm"] });
  return { session, tokenizer: new Tokenizer(settings, {}) };
}

/** Unit vectors of texts, one after another. */
async function embed(texts) {
  const { start, end, length } = model.tokens, tokens = new BigInt64Array(texts.length * length);
  texts.forEach((one, row) => {
    const { ids } = words.tokenizer.encode(one, { add_special_tokens: false });
    const all = [start, ...ids.slice(0, length - 2), end];
    tokens.set(all.map(BigInt), row * length);
  });
  const result = await words.session.run({ tokens: new ort.Tensor("int64", tokens, [texts.length, length]) });
  return result.text.data;
}

async function file(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (status ${response.status}).`);
  return response;
}

async function download(name) {
  const response = await file(name), total = Number(response.headers.get("Content-Length")) || 0;
  const parts = [], reader = response.body.getReader();
  for (let loaded = 0; ; ) {
    const { done, value } = await reader.read();
    if (done) return new Blob(parts).arrayBuffer();
    parts.push(value);
    loaded += value.length;
    self.postMessage({ progress: total ? loaded / total : null, name });
  }
}

async function unzipped(buffer) {
  const bytes = new Uint8Array(buffer, 0, 2);
  // Some servers have already undone the compression.
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return buffer;
  return new Response(new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
