// Labels of pixels from scores of patches.

/**
 * Interpolate scores bilinearly and find the best class of every pixel.
 *
 * @param {Float32Array} scores - (Q, rows, columns), one map for every name of a class.
 * @param {number[]} shape - [Q, rows, columns].
 * @param {number[]} queryClass - class of every map.
 * @param {Set<number>} chosen - classes that may be found; not empty.
 * @param {number} patch - side of a patch in pixels.
 * @param {number} width - of the image.
 * @param {number} height - of the image.
 * @returns {{labels: Uint16Array, best: Float32Array}} class and score of every pixel, row by row.
 */
export function labelPixels(scores, shape, queryClass, chosen, patch, width, height) {
  const [queries, rows, columns] = shape;
  const labels = new Uint16Array(width * height), best = new Float32Array(width * height).fill(-Infinity);
  const across = positions(width, columns, patch), down = positions(height, rows, patch);
  const line = new Float32Array(columns);
  for (let query = 0; query < queries; query++) {
    if (!chosen.has(queryClass[query])) continue;
    const map = scores.subarray(query * rows * columns, (query + 1) * rows * columns);
    for (let y = 0, pixel = 0; y < height; y++) {
      const above = down.first[y] * columns, below = down.second[y] * columns, share = down.share[y];
      for (let c = 0; c < columns; c++) line[c] = map[above + c] * (1 - share) + map[below + c] * share;
      for (let x = 0; x < width; x++, pixel++) {
        const part = across.share[x];
        const value = line[across.first[x]] * (1 - part) + line[across.second[x]] * part;
        if (value > best[pixel]) {
          best[pixel] = value;
          labels[pixel] = queryClass[query];
        }
      }
    }
  }
  return { labels, best };
}

/** For every pixel of a side: the two nearest patches, and the weight of the second. */
function positions(pixels, patches, patch) {
  const first = new Uint32Array(pixels), second = new Uint32Array(pixels), share = new Float32Array(pixels);
  for (let i = 0; i < pixels; i++) {
    const position = Math.min(Math.max((i + 0.5) / patch - 0.5, 0), patches - 1);
    first[i] = Math.floor(position);
    second[i] = Math.min(first[i] + 1, patches - 1);
    share[i] = position - first[i];
  }
  return { first, second, share };
}
