// Markdown to DOM nodes: marked reads it, DOMPurify lets only harmless elements through, code is highlighted and formulas
// are set by libraries that are loaded when the first of them appears.
import "../vendor/dompurify.js";
import { lexer, marked } from "../vendor/marked.js";
import { copyText } from "./dom.js";

const TAGS =
  "a blockquote br code del div em h1 h2 h3 h4 h5 h6 hr input li ol p pre span strong sub sup table tbody td th thead tr ul";
const PLAIN_ATTRIBUTES = ["title", "align", "checked", "disabled", "type", "start", "class", "data-math", "data-display"];
const HARMLESS = {
  ALLOWED_TAGS: TAGS.split(" "),
  ALLOWED_ATTR: ["href", ...PLAIN_ATTRIBUTES],
  ADD_URI_SAFE_ATTR: PLAIN_ATTRIBUTES, // their values are no addresses, so the pattern of addresses does not apply
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const LANGUAGES = {
  bash: "bash", sh: "bash", shell: "bash", zsh: "bash", console: "bash", c: "c", h: "c", cpp: "cpp", "c++": "cpp", cc: "cpp",
  css: "css", diff: "diff", patch: "diff", go: "go", golang: "go", ini: "ini", toml: "ini", java: "java",
  javascript: "javascript", js: "javascript", jsx: "javascript", json: "json", markdown: "markdown", md: "markdown",
  python: "python", py: "python", rust: "rust", rs: "rust", sql: "sql", typescript: "typescript", ts: "typescript",
  tsx: "typescript", xml: "xml", html: "xml", svg: "xml", yaml: "yaml", yml: "yaml",
};
const LONGEST_HIGHLIGHTED = 60_000; // characters of one block of code

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => escapes[character]);

/** A marked extension for one way to write formulas. The first group of the pattern that matches is the formula. */
function formula(name, level, start, pattern, display) {
  return {
    name,
    level,
    start: (source) => source.match(start)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      return match ? { type: name, raw: match[0], text: match.slice(1).find(Boolean).trim() } : undefined;
    },
    renderer: ({ raw, text }) =>
      `<span data-math="${escape(text)}"${display ? ' data-display="1"' : ""}>${escape(raw.trim())}</span>`,
  };
}

marked.use({
  gfm: true,
  breaks: true,
  extensions: [
    formula("blockFormula", "block", /\$\$|\\\[/, /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/, true),
    formula("displayFormula", "inline", /\$\$|\\\[/, /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])/, true),
    // Not what "$5 and $10" means: no space inside the signs, no digit after the second.
    formula("inlineFormula", "inline", /\$|\\\(/, /^(?:\$(?![\s$])((?:[^$\\\n]|\\.)+?)(?<!\s)\$(?![\d$])|\\\(([^]+?)\\\))/, false),
  ],
  renderer: {
    // A model's HTML is shown as the text that it is, apart from what markdown has no sign for.
    html: ({ text }) => (/^<\/?(?:br|sub|sup)\s*\/?>$/i.test(text.trim()) ? text : escape(text)),
    // A picture would tell its host who reads what; a link does so only when it is followed.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

/** Text as top-level blocks of markdown. Blocks of a text that only grows are read once, apart from the last ones. */
export class Blocks {
  constructor() {
    this.source = "";
    this.finished = []; // blocks that later text cannot change
    this.offset = 0; // where the others begin
  }

  update(text) {
    const source = text.replace(/\r\n?/g, "\n");
    if (!source.startsWith(this.source)) {
      this.finished = [];
      this.offset = 0;
    }
    this.source = source;
    const raws = [];
    for (const token of lexer(source.slice(this.offset))) {
      // A definition of a link, and blank lines, belong to the block before.
      if ((token.type === "space" || token.type === "def") && raws.length) raws[raws.length - 1] += token.raw;
      else raws.push(token.raw);
    }
    // A list may still turn into a loose one and a line into a table: the last two blocks stay open.
    while (raws.length > 2) {
      const raw = raws.shift();
      this.finished.push(raw);
      this.offset += raw.length;
    }
    return [...this.finished, ...raws];
  }
}

/** A block as DOM nodes. While it still grows, long code is not coloured. */
export function renderMarkdown(source, growing = false) {
  const fragment = globalThis.DOMPurify.sanitize(marked.parse(source), HARMLESS);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = document.createElement("div");
    frame.className = "table-frame";
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", "Table");
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) dressCode(code, growing);
  for (const place of fragment.querySelectorAll("[data-math]")) setFormula(place);
  return fragment;
}

function dressCode(code, growing) {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  const frame = document.createElement("div");
  frame.className = "code-frame";
  const bar = document.createElement("div");
  bar.className = "code-bar";
  const name = document.createElement("span");
  name.textContent = language || "text";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await copyText(code.textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  bar.append(name, button);
  const pre = code.parentElement;
  pre.tabIndex = 0; // scrolled by keyboard
  pre.replaceWith(frame);
  frame.append(bar, pre);
  const file = LANGUAGES[language.toLowerCase()];
  if (file && code.textContent.length <= (growing ? 4000 : LONGEST_HIGHLIGHTED)) highlight(code, file);
}

let highlighter = null;
const languages = new Map();

function highlight(code, name) {
  const colour = () => {
    code.innerHTML = highlighter.highlight(code.textContent, { language: name }).value; // escaped by the library
  };
  if (languages.get(name) === true) return colour();
  if (!languages.has(name)) languages.set(name, loadLanguage(name));
  return languages.get(name).then(colour, () => {});
}

async function loadLanguage(name) {
  const [core, language] = await Promise.all([
    import("../vendor/highlight/core.js"),
    import(`../vendor/highlight/languages/${name}.js`),
  ]);
  highlighter = core.default;
  highlighter.registerLanguage(name, language.default);
  languages.set(name, true);
}

let katex = null;

function setFormula(place) {
  const set = () => {
    const options = { displayMode: "display" in place.dataset, throwOnError: false, maxSize: 50, maxExpand: 300 };
    try {
      // Into the element, not as HTML: the policy forbids style attributes in markup, not styles set by a script.
      globalThis.katex.render(place.dataset.math, place, options);
    } catch {
      place.textContent = place.dataset.math;
    }
  };
  if (globalThis.katex) return set();
  katex ??= loadKatex();
  return katex.then(set, () => (katex = null));
}

function loadKatex() {
  const sheet = document.createElement("link");
  sheet.rel = "stylesheet";
  sheet.href = new URL("../vendor/katex/katex.css", import.meta.url).href;
  document.head.append(sheet);
  const sheetLoaded = new Promise((resolve) => (sheet.onload = sheet.onerror = resolve));
  return Promise.all([import("../vendor/katex/katex.js"), sheetLoaded]);
}
