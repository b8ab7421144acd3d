// The conversations that this browser keeps, and the ways to the other views.
import * as chats from "../chats.js";
import { classes, download, html, memo, useEffect, useRef, useSignal, useState } from "../dom.js";
import { confirm, prompt, shortcutsShown, tell } from "./dialogs.js";
import { Icon, IconButton, Logo } from "./icons.js";

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - time) / 86_400_000);
  return days <= 0 ? "Today" : days === 1 ? "Yesterday" : days <= 7 ? "This week" : days <= 30 ? "This month" : "Earlier";
}

export async function exportFile(ids, name) {
  download(`${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation"}.json`, await chats.exported(ids));
}

const Entry = memo(function Entry({ entry, current, onGone }) {
  const [menu, setMenu] = useState(false);
  const place = useRef(null);
  const button = useRef(null);
  useEffect(() => {
    if (!menu) return undefined;
    place.current.querySelector(".menu button").focus();
    const outside = (event) => !place.current.contains(event.target) && setMenu(false);
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, [menu]);
  const close = () => {
    setMenu(false);
    button.current?.querySelector("button")?.focus();
  };
  const keys = (event) => {
    const items = [...place.current.querySelectorAll(".menu button")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const does = (action) => () => {
    close();
    action();
  };
  const rename = async () => {
    const title = await prompt("Rename the conversation", entry.title, "Rename");
    if (title) chats.rename(entry.id, title);
  };
  const remove = async () => {
    if (!(await confirm("Delete this conversation?", `“${entry.title}” will be gone, with all its branches.`, "Delete"))) return;
    await chats.removeConversation(entry.id);
    onGone(entry.id);
  };
  return html`<li class=${classes("entry", current && "current", menu && "open")} ref=${place}>
    <a href=${`#/chat/${entry.id}`} aria-current=${current ? "page" : undefined} title=${entry.title}>${entry.title}</a>
    <span ref=${button}><${IconButton} icon="more" label=${`More for ${entry.title}`} aria-haspopup="menu" aria-expanded=${menu ? "true" : "false"}
      onClick=${() => setMenu(!menu)} /></span>
    ${menu &&
    html`<div class="menu" role="menu" onKeyDown=${keys}>
      <button type="button" role="menuitem" onClick=${does(rename)}><${Icon} name="edit" /> Rename</button>
      <button type="button" role="menuitem" onClick=${does(() => exportFile([entry.id], entry.title))}><${Icon} name="save" /> Export</button>
      <button type="button" role="menuitem" class="danger" onClick=${does(remove)}><${Icon} name="trash" /> Delete</button>
    </div>`}
  </li>`;
});

export function Sidebar({ route, onNew, onHide }) {
  const list = useSignal(chats.list);
  const problem = useSignal(chats.storageProblem);
  const open = useSignal(chats.open);
  const [wanted, setWanted] = useState("");
  const [found, setFound] = useState(null);
  const picker = useRef(null);
  useEffect(() => {
    if (!wanted.trim()) return setFound(null);
    let current = true;
    const timer = setTimeout(() => chats.search(wanted).then((ids) => current && setFound(ids)), 120);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [wanted, list]);
  const shown = found ? list.filter((entry) => found.has(entry.id)) : list;
  const groups = new Map();
  for (const entry of shown) {
    const group = groupOf(entry.updated);
    groups.set(group, [...(groups.get(group) ?? []), entry]);
  }
  const load = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    try {
      const count = await chats.imported(await file.text());
      await tell("Imported", `${count} conversation${count === 1 ? " is" : "s are"} here now.`);
    } catch (error) {
      await tell("Not imported", error.message);
    }
  };
  const gone = (id) => chats.open.value?.record.id === id && onNew();
  const link = (name, icon, text) =>
    html`<a href=${`#/${name}`} class=${classes("nav", route.view === name && "current")} aria-current=${route.view === name ? "page" : undefined}>
      <${Icon} name=${icon} /> ${text}</a>`;
  return html`<nav class="sidebar" aria-label="Conversations">
    <header><a class="brand" href="#/"><${Logo} /><span>Mnemos</span></a>
      <${IconButton} icon="sidebar" label="Hide the conversations" shortcut="Ctrl+B" onClick=${onHide} /></header>
    <button type="button" class="button new" title="New conversation (Ctrl+Shift+O)" onClick=${onNew}><${Icon} name="plus" /> New conversation</button>
    <label class="search"><${Icon} name="search" /><input type="search" id="search" placeholder="Search" aria-label="Search conversations"
      value=${wanted} onInput=${(event) => setWanted(event.target.value)} /></label>
    <div class="entries">
      ${[...groups].map(
        ([group, entries]) => html`<section key=${group} aria-label=${group}><h2>${group}</h2><ul>${entries.map(
          (entry) => html`<${Entry} key=${entry.id} entry=${entry} current=${route.view === "chat" && open?.record.id === entry.id} onGone=${gone} />`,
        )}</ul></section>`,
      )}
      ${!shown.length && html`<p class="help">${wanted ? "Nothing found." : "Conversations are kept in this browser."}</p>`}
      ${problem && html`<p class="note">${problem}</p>`}
    </div>
    <footer>
      ${link("compare", "columns", "Side by side")} ${link("engine", "pulse", "The engine")}
      <div class="tools">
        <${IconButton} icon="load" label="Import conversations" onClick=${() => picker.current.click()} />
        <${IconButton} icon="save" label="Export all conversations" disabled=${!list.length} onClick=${() => exportFile(null, "mnemos-conversations")} />
        <${IconButton} icon="keyboard" label="Keyboard shortcuts" shortcut="?" onClick=${() => (shortcutsShown.value = true)} />
        <input ref=${picker} type="file" accept=".json,application/json" hidden onChange=${load} />
      </div>
    </footer>
  </nav>`;
}
