// Requests to the service, and their results.

/** An error whose message is a sentence for the user. */
export class Refused extends Error {}

/** Send a form, and return the response. Raises Refused with the sentence of the service. */
export async function send(path, fields, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== "" && value !== undefined) form.append(name, value);
  }
  let response;
  try {
    response = await fetch(path, { method: "POST", body: form, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(body.error ?? `The service answered with the status ${response.status}.`);
}

/** Segment an image file: the record of the service, with its maps as arrays. */
export async function segment(fields, signal) {
  const record = await (await send("/segment", { ...fields, scores: "true" }, signal)).json();
  record.labels = await unpacked(record.labels);
  const { low, high } = record.scores;
  const values = await unpacked(record.scores);
  record.scoreAt = (index) => low + (values[index] * (high - low)) / 255;
  // Another run may have begun meanwhile.
  signal.throwIfAborted();
  return record;
}

async function unpacked(map) {
  const bytes = Uint8Array.from(atob(map.zlib_base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return map.dtype === "uint16" ? new Uint16Array(buffer) : new Uint8Array(buffer);
}
