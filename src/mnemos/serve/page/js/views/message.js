// One message: what it says, what can be done with it, and what it took.
import * as chats from "../chats.js";
import { Component, announce, classes, copyText, html, memo, useLayoutEffect, useRef, useState } from "../dom.js";
import { Blocks, renderMarkdown } from "../markdown.js";
import { answer, continueReply, retry, stop } from "../replies.js";
import { placeOf } from "../tree.js";
import { confirm } from "./dialogs.js";
import { Icon, IconButton } from "./icons.js";
import { Inside } from "./inside.js";

/** A block of markdown; drawn again only when its own source changes. */
class Block extends Component {
  shouldComponentUpdate({ source, growing }) {
    return source !== this.props.source || growing !== this.props.growing;
  }

  draw() {
    this.base.replaceChildren(renderMarkdown(this.props.source, this.props.growing));
  }

  componentDidMount() {
    this.draw();
  }

  componentDidUpdate() {
    this.draw();
  }

  render() {
    return html`<div class="block"></div>`;
  }
}

export function Markdown({ text, growing }) {
  const blocks = useRef(null);
  blocks.current ??= new Blocks();
  const sources = blocks.current.update(text);
  return html`<div class="markdown">${sources.map(
    (source, i) => html`<${Block} key=${i} source=${source} growing=${growing && i >= sources.length - 2} />`,
  )}</div>`;
}

function Reasoning({ node, busy }) {
  const thinking = busy && !node.content;
  return html`<details class="reasoning" open=${thinking}>
    <summary>${thinking ? html`<span class="pulse">Thinking</span>` : "Reasoning"}</summary>
    <${Markdown} text=${node.reasoning} growing=${thinking} />
  </details>`;
}

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);

export function Figures({ figures }) {
  if (!figures?.tokens) return null;
  const parts = [
    `${figures.tokens.toLocaleString("en")} token${figures.tokens === 1 ? "" : "s"}`,
    figures.rate && `${figures.rate.toFixed(figures.rate < 100 ? 1 : 0)} tokens/s`,
    figures.firstToken !== null && `first after ${seconds(figures.firstToken)}`,
  ];
  const prompt = figures.prompt
    ? `Prompt: ${figures.prompt.toLocaleString("en")} tokens${figures.cached ? `, ${figures.cached.toLocaleString("en")} of them cached` : ""}`
    : undefined;
  return html`<span class="figures" title=${prompt}>${parts.filter(Boolean).map((part, i, all) => html`<span>${part}${i < all.length - 1 ? " ·" : ""}</span>${" "}`)}</span>`;
}

const ENDS = {
  stopped: "Stopped.",
  length: "The limit of tokens was reached.",
};

function Ending({ conversation, node }) {
  if (node.error) {
    return html`<div class="ending error" role="alert">
      <p>${node.error.message}${node.error.connection && node.content && " What had arrived is kept."}</p>
      <div>
        ${node.content && html`<button type="button" class="button" onClick=${() => continueReply(conversation, node.id)}>Continue</button>`}
        <button type="button" class="button" onClick=${() => retry(conversation, node.id)}>Try again</button>
      </div>
    </div>`;
  }
  if (!ENDS[node.finish]) return null;
  return html`<div class="ending"><p>${ENDS[node.finish]}</p>
    <button type="button" class="button small" onClick=${() => continueReply(conversation, node.id)}>Continue</button></div>`;
}

function Branches({ conversation, node }) {
  const { index, count } = placeOf(conversation.nodes, node);
  if (count < 2) return null;
  const show = (step) => {
    chats.showSibling(conversation, node.id, step);
    announce(`Branch ${index + step + 1} of ${count}`);
  };
  return html`<span class="branches" role="group" aria-label=${`Branch ${index + 1} of ${count}`}>
    <${IconButton} icon="left" label="Previous branch" disabled=${index === 0} onClick=${() => show(-1)} />
    <span aria-hidden="true">${index + 1}/${count}</span>
    <${IconButton} icon="right" label="Next branch" disabled=${index === count - 1} onClick=${() => show(1)} />
  </span>`;
}

function Editor({ node, onSave, onCancel }) {
  const area = useRef(null);
  useLayoutEffect(() => {
    area.current.value = node.content;
    area.current.focus();
    area.current.setSelectionRange(node.content.length, node.content.length);
  }, []);
  const save = () => onSave(area.current.value);
  const keys = (event) => {
    if (event.key === "Escape") onCancel();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey || (node.role === "user" && !event.shiftKey)) && !event.isComposing) save();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  return html`<div class="editor">
    <textarea class="input" ref=${area} rows=${Math.min(node.content.split("\n").length + 1, 16)}
      aria-label="Edit the message" onKeyDown=${keys} />
    <div class="editor-actions"><span class="help">The original stays as another branch.</span>
      <button type="button" class="button" onClick=${onCancel}>Cancel</button>
      <button type="button" class="button primary" onClick=${save}>${node.role === "user" ? "Send" : "Save"}</button></div>
  </div>`;
}

export function Attachments({ files, onRemove }) {
  if (!files?.length) return null;
  return html`<ul class="attachments" aria-label="Attached files">${files.map(
    (file, i) => html`<li><${Icon} name="file" /><span>${file.name}</span><small>${size(file.text.length)}</small>
      ${onRemove && html`<${IconButton} icon="close" label=${`Remove ${file.name}`} onClick=${() => onRemove(i)} />`}</li>`,
  )}</ul>`;
}

const size = (characters) => (characters < 1000 ? `${characters} B` : `${(characters / 1000).toFixed(characters < 10_000 ? 1 : 0)} kB`);

function CopyButton({ text }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    await copyText(text);
    setDone(true);
    setTimeout(() => setDone(false), 1500);
  };
  return html`<${IconButton} icon=${done ? "check" : "copy"} label=${done ? "Copied" : "Copy"} onClick=${copy} class="copy" />`;
}

/** Moves the focus to the branch that is shown instead of the message that had it, once it is drawn. */
function focusBranch(conversation) {
  const parent = document.activeElement.dataset.parent;
  const focus = () => {
    const taken = document.activeElement !== document.body && document.activeElement.dataset.parent !== parent;
    if (!taken) document.querySelector(`[data-id="${conversation.nodes.get(parent)?.selected}"]`)?.focus();
  };
  requestAnimationFrame(() => requestAnimationFrame(focus));
}

export const Message = memo(function Message({ conversation, node, parent, busy, inside, last }) {
  const [editing, setEditing] = useState(false);
  const article = useRef(null);
  const user = node.role === "user";
  const look = () => chats.lookInside(node.id, !inside);
  const save = (content) => {
    setEditing(false);
    if (content === node.content) return;
    const fields = { parent: node.parent, role: node.role, content, ...(user ? { attachments: node.attachments } : { model: node.model, finish: "edited" }) };
    const added = chats.add(conversation, fields);
    if (user) answer(conversation, added.id);
  };
  const regenerate = () => answer(conversation, user ? node.id : node.parent);
  const remove = async () => {
    const text = node.children.length ? "All messages after it in this branch go with it." : "Other branches stay.";
    if (await confirm("Delete this message?", text, "Delete")) chats.remove(conversation, node.id);
  };
  const keys = (event) => {
    if (event.target !== article.current || event.ctrlKey || event.metaKey || event.altKey) return;
    const action = {
      e: () => !busy && setEditing(true),
      r: () => !busy && (regenerate(), focusBranch(conversation)),
      c: () => copyText(node.content).then(() => announce("Copied")),
      i: () => !user && look(),
      ArrowLeft: () => (chats.showSibling(conversation, node.id, -1), focusBranch(conversation)),
      ArrowRight: () => (chats.showSibling(conversation, node.id, 1), focusBranch(conversation)),
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };

  const body = () => {
    if (editing) return html`<${Editor} node=${node} onSave=${save} onCancel=${() => setEditing(false)} />`;
    if (user) return html`<${Attachments} files=${node.attachments} />${node.content && html`<div class="said">${node.content}</div>`}`;
    return html`${node.reasoning && html`<${Reasoning} node=${node} busy=${busy} />`}
      ${inside
        ? html`<${Inside} conversation=${conversation} node=${node} busy=${busy} />`
        : html`<${Markdown} text=${node.content} growing=${busy} />`}
      ${busy && !node.content && !node.reasoning && html`<p class="waiting"><span class="dots"><i></i><i></i><i></i></span> ${node.waiting ?? ""}</p>`}
      ${!busy && html`<${Ending} conversation=${conversation} node=${node} />`}`;
  };
  return html`<article ref=${article} class=${classes("message", node.role, busy && "busy", last && "last")} tabindex="-1" data-id=${node.id} data-parent=${node.parent}
      aria-label=${user ? "You" : `Reply${node.model ? ` of ${node.model}` : ""}`} aria-busy=${busy ? "true" : "false"} onKeyDown=${keys}>
    ${body()}
    ${!editing &&
    html`<div class="message-foot">
      <div class="actions">
        <${Branches} conversation=${conversation} node=${node} parent=${parent} />
        ${!user &&
        (node.content || !busy) &&
        html`<button type="button" class=${classes("button small inside-button", inside && "on")} aria-pressed=${inside ? "true" : "false"}
          onClick=${look}><${Icon} name="eye" /> Look inside</button>`}
        ${busy
          ? html`<button type="button" class="button small" onClick=${() => stop(node.id)}>Stop</button>`
          : html`<${CopyButton} text=${node.content} />
              <${IconButton} icon="edit" label="Edit" onClick=${() => setEditing(true)} />
              ${!user && html`<${IconButton} icon="retry" label="Regenerate" onClick=${regenerate} />`}
              <${IconButton} icon="fork" label="New conversation from here" onClick=${() => chats.fork(conversation, node.id)} />
              <${IconButton} icon="trash" label="Delete" onClick=${remove} />`}
      </div>
      ${!user && html`<${Figures} figures=${busy ? node.live : node.stats} />`}
    </div>`}
  </article>`;
});
