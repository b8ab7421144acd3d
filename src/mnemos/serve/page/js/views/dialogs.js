// Questions that wait for an answer, and the list of shortcuts. The browser's own <dialog> keeps the focus inside.
import { keyQuestion } from "../api.js";
import { Signal, html, useLayoutEffect, useRef, useSignal, useState } from "../dom.js";

/** The open question: null, or {title, text, action, dangerous, field, answer(value or null)}. */
const question = new Signal(null);

function ask(fields) {
  return new Promise((resolve) => {
    question.value = { ...fields, answer: (value) => ((question.value = null), resolve(value)) };
  });
}

/** Resolves to true if the user agrees. */
export const confirm = (title, text, action) => ask({ title, text, action, dangerous: true }).then(Boolean);

/** Resolves to the text that the user wrote, or null. */
export const prompt = (title, initial, action = "Save") => ask({ title, action, field: { initial } });

export const tell = (title, text) => ask({ title, text, action: "OK", only: true });

export const shortcutsShown = new Signal(false);

export function Dialog({ title, onClose, children, name }) {
  const dialog = useRef(null);
  useLayoutEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before?.isConnected && before.focus();
  }, []);
  const cancel = (event) => {
    event.preventDefault();
    onClose();
  };
  const outside = (event) => event.target === dialog.current && onClose();
  return html`<dialog ref=${dialog} class=${`dialog ${name ?? ""}`} aria-label=${title} onCancel=${cancel} onMouseDown=${outside}>
    <div class="dialog-inner"><h2>${title}</h2>${children}</div>
  </dialog>`;
}

function Question({ asked }) {
  const [value, setValue] = useState(asked.field?.initial ?? "");
  const submit = (event) => {
    event.preventDefault();
    asked.answer(asked.field ? value.trim() || null : true);
  };
  return html`<${Dialog} title=${asked.title} onClose=${() => asked.answer(null)}>
    <form onSubmit=${submit}>
      ${asked.text && html`<p>${asked.text}</p>`}
      ${asked.field &&
      html`<input class="input" type=${asked.field.type ?? "text"} aria-label=${asked.title} value=${value} autofocus
        autocomplete="off" onInput=${(event) => setValue(event.target.value)} />`}
      <div class="dialog-actions">
        ${!asked.only && html`<button type="button" class="button" autofocus=${asked.dangerous} onClick=${() => asked.answer(null)}>Cancel</button>`}
        <button type="submit" class=${`button ${asked.dangerous ? "danger" : "primary"}`} autofocus=${!asked.field && !asked.dangerous}>${asked.action}</button>
      </div>
    </form>
  </${Dialog}>`;
}

const SHORTCUTS = [
  ["Enter", "Send"],
  ["Shift+Enter", "New line"],
  ["Esc", "Stop the reply, close what is open"],
  ["↑", "In an empty message: edit the last one you sent"],
  ["/", "Go to the message field"],
  ["Ctrl+K", "Search conversations"],
  ["Ctrl+Shift+O", "New conversation"],
  ["Ctrl+B", "Show or hide the conversations"],
  ["Ctrl+,", "Settings"],
  ["Alt+↑ Alt+↓", "Go from message to message"],
  ["E R C I", "On a message: edit, regenerate, copy, look inside"],
  ["← →", "On a message: other branches"],
  ["← → Enter", "Inside a reply: go from token to token, show alternatives"],
  ["?", "This list"],
];

function Shortcuts() {
  const close = () => (shortcutsShown.value = false);
  return html`<${Dialog} title="Keyboard shortcuts" onClose=${close} name="shortcuts">
    <dl>${SHORTCUTS.map(
      ([keys, what]) => html`<div>
        <dt>${keys.split(" ").map((key) => html`<kbd>${key}</kbd>`)}</dt><dd>${what}</dd></div>`,
    )}</dl>
    <div class="dialog-actions"><button type="button" class="button" autofocus onClick=${close}>Close</button></div>
  </${Dialog}>`;
}

export function Dialogs() {
  const asked = useSignal(question);
  const key = useSignal(keyQuestion);
  const shortcuts = useSignal(shortcutsShown);
  if (key) {
    const text = key.wrong ? "The server does not accept the key that this browser has." : "This server asks for an API key.";
    const asking = { ...key, title: "API key", text: `${text} It is kept in this browser.`, action: "Use key" };
    return html`<${Question} key="key" asked=${{ ...asking, field: { initial: "", type: "password" } }} />`;
  }
  if (asked) return html`<${Question} key=${asked.title} asked=${asked} />`;
  return shortcuts ? html`<${Shortcuts} key="shortcuts" />` : null;
}
