// Typed class names, as Python's Vocabulary.load reads them.

// What Python calls a space; JavaScript has another set.
const SPACE = "[\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const ENDS = new RegExp(`^${SPACE}+|${SPACE}+$`, "g"), SPACES = new RegExp(`${SPACE}+`, "g");
const CONTROLS = /[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g;
// Latin ligatures, and characters of full or half width.
const JOINED = /[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb04\ufb06\uff01-\uffee\u3000]/g;

/**
 * Split classes at semicolons and ends of lines, and synonyms at commas. A synonym belongs to one class: to the first
 * that starts with it, or else to the first that has it. A class may be left without synonyms.
 *
 * @param {string} typed - what a visitor has typed.
 * @returns {{name: string, synonyms: string[], texts: string[]}[]} classes; texts are the synonyms for the tokenizer.
 */
export function readClasses(typed) {
  const strip = (name) => name.normalize("NFC").replace(ENDS, "");
  const lists = typed.split(/[;\n]/).map((part) => part.split(",").map(strip).filter(Boolean)).filter((names) => names.length);
  const owners = new Map();
  const own = (name, number) => owners.get(folded(name)) ?? (owners.set(folded(name), number), number);
  lists.forEach(([first], number) => own(first, number));
  return lists.map((names, number) => {
    const kept = new Map();
    for (const name of names) if (own(name, number) === number && !kept.has(folded(name))) kept.set(folded(name), name);
    const synonyms = [...kept.values()];
    return { name: synonyms[0] ?? names[0], synonyms, texts: synonyms.map(cleaned) };
  });
}

/** A name for comparisons, without case: as casefold() of Python. */
function folded(name) {
  // An i without a dot is no other case of an i with a dot.
  const lower = name.replace(/[^\u0131]+/g, (part) => part.toLowerCase().toUpperCase().toLowerCase());
  return lower.replaceAll("\u03c2", "\u03c3").normalize("NFC").replace(SPACES, " ").replace(ENDS, "");
}

/** A name as open_clip cleans it: without HTML escapes, ligatures, curly quotes and control characters. */
function cleaned(name) {
  const plain = unescaped(name)
    .replace(JOINED, (letter) => letter.normalize("NFKC"))
    .replace(/[\u02bc\u2018-\u201b]/g, "'")
    .replace(/[\u201c-\u201f]/g, '"')
    .replace(/\p{Surrogate}/gu, "\ufffd")
    .replace(CONTROLS, "");
  return unescaped(unescaped(plain)).replace(SPACES, " ").replace(ENDS, "");
}

function unescaped(text) {
  return text.replace(/&[^\s<&;]{1,32};?/g, (escape) => {
    const element = document.createElement("textarea");
    element.innerHTML = escape;
    return element.textContent;
  });
}
