// Where the user writes: the text, attached files, and how full the context is.
import { classes, html, useEffect, useLayoutEffect, useRef, useState } from "../dom.js";
import { tell } from "./dialogs.js";
import { Icon, IconButton } from "./icons.js";
import { Attachments } from "./message.js";

const LARGEST_FILE = 2_000_000; // bytes

/** Files as {name, text}; those that are no text are named in a message. */
export async function readFiles(files) {
  const read = [];
  const refused = [];
  for (const file of files) {
    const text = file.size <= LARGEST_FILE ? await decode(file) : null;
    if (text === null) refused.push(file.name);
    else read.push({ name: file.name, text });
  }
  if (refused.length) await tell("Not attached", `${refused.join(", ")}: only text files of at most 2 MB can be attached.`);
  return read;
}

async function decode(file) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}

/** Tokens of the conversation so far, and about those of the draft, beside the context's length. */
function Meter({ used, draft, context }) {
  if (!context) return null;
  const estimated = Math.ceil(draft / 4);
  const share = Math.min((used + estimated) / context, 1);
  const text = !used && !estimated ? `${context.toLocaleString("en")} tokens` : `${estimated ? "about " : ""}${(used + estimated).toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
  return html`<span class=${classes("meter", share > 0.9 ? "full" : share > 0.7 && "filling")} role="meter" aria-label="Context used"
    aria-valuemin="0" aria-valuemax=${context} aria-valuenow=${Math.min(used + estimated, context)} aria-valuetext=${text} title=${`Context: ${text}`}>
    <span class="meter-track"><span style=${{ width: `${100 * share}%` }}></span></span><span class="meter-text">${text}</span></span>`;
}

export function Composer({ draftKey, busy, onSend, onStop, onEditLast, used, context, placeholder, children }) {
  const [text, setText] = useState("");
  const [files, setFiles] = useState([]);
  const [dragging, setDragging] = useState(false);
  const area = useRef(null);
  const picker = useRef(null);
  const drafts = useRef(new Map());
  useEffect(() => {
    const kept = drafts.current.get(draftKey);
    setText(kept?.text ?? "");
    setFiles(kept?.files ?? []);
    if (matchMedia("(pointer: fine)").matches) area.current.focus();
  }, [draftKey]);
  useLayoutEffect(() => {
    area.current.style.height = "auto";
    area.current.style.height = `${Math.min(area.current.scrollHeight, 0.4 * window.innerHeight)}px`;
  }, [text]);

  const change = (newText, newFiles) => {
    setText(newText);
    setFiles(newFiles);
    drafts.current.set(draftKey, { text: newText, files: newFiles });
  };
  const attach = async (given) => {
    const read = await readFiles(given);
    if (read.length) change(area.current.value, [...files, ...read]);
    area.current.focus();
  };
  const ready = !busy && (text.trim() || files.length);
  const send = () => {
    if (!ready) return;
    onSend(text, files);
    change("", []);
  };
  const keys = (event) => {
    // On a touch screen the key is the only way to a new line.
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
    if (sends) send();
    else if (event.key === "ArrowUp" && !event.altKey && !text && onEditLast) onEditLast();
    else return;
    event.preventDefault();
  };
  const paste = (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      attach(event.clipboardData.files);
    }
  };
  const drop = (event) => {
    event.preventDefault();
    setDragging(false);
    attach(event.dataTransfer.files);
  };
  const over = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    setDragging(true);
  };
  const submit = (event) => {
    event.preventDefault();
    send();
  };
  return html`<form class=${classes("composer", dragging && "dragging")} onSubmit=${submit} onDragOver=${over}
      onDragLeave=${() => setDragging(false)} onDrop=${drop}>
    <${Attachments} files=${files} onRemove=${(index) => change(text, files.filter((_, i) => i !== index))} />
    <textarea ref=${area} id="composer" rows="1" value=${text} placeholder=${placeholder} aria-label="Message" onKeyDown=${keys}
      onInput=${(event) => change(event.target.value, files)} onPaste=${paste} />
    <div class="composer-foot">
      <input ref=${picker} type="file" multiple hidden onChange=${(event) => attach([...event.target.files]).then(() => (event.target.value = ""))} />
      <${IconButton} icon="clip" label="Attach text files" onClick=${() => picker.current.click()} />
      ${children}
      <${Meter} used=${used} draft=${text.length + files.reduce((sum, file) => sum + file.text.length, 0)} context=${context} />
      ${busy
        ? html`<button type="button" class="send stop" aria-label="Stop" title="Stop (Esc)" onClick=${onStop}><${Icon} name="stop" /></button>`
        : html`<button type="submit" class="send" aria-label="Send" title="Send (Enter)" disabled=${!ready}><${Icon} name="send" /></button>`}
    </div>
  </form>`;
}
