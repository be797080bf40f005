// Label maps as gray PNG files of 8 or 16 bits, which a canvas cannot write.

const TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

/** Encode labels, a Uint8Array or Uint16Array of width * height values. */
export async function labelPng(labels, width, height) {
  const depth = labels.BYTES_PER_ELEMENT;
  // Each row begins with its filter, which is 0: none.
  const rows = new DataView(new ArrayBuffer(height * (1 + width * depth)));
  for (let y = 0, at = 0; y < height; y++) {
    at++;
    for (let x = 0; x < width; x++, at += depth) {
      const value = labels[y * width + x];
      if (depth === 1) rows.setUint8(at, value);
      else rows.setUint16(at, value);
    }
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8 * depth);
  const stream = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const pixels = await new Response(stream).arrayBuffer();
  const signature = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  const chunks = [chunk("IHDR", header.buffer), chunk("IDAT", pixels), chunk("IEND", new ArrayBuffer(0))];
  return new Blob([signature, ...chunks], { type: "image/png" });
}

function chunk(name, content) {
  const bytes = new Uint8Array(12 + content.byteLength);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.byteLength);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(new Uint8Array(content), 8);
  let sum = 0xffffffff;
  for (const byte of bytes.subarray(4, -4)) sum = TABLE[(sum ^ byte) & 255] ^ (sum >>> 8);
  view.setUint32(bytes.length - 4, ~sum);
  return bytes;
}
