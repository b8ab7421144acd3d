// The open conversation: its messages and the place to write the next one.
import * as chats from "../chats.js";
import { html, useEffect, useLayoutEffect, useRef, useSignal, useState } from "../dom.js";
import { running, sendMessage, stop } from "../replies.js";
import { contextOf, server } from "../settings.js";
import { shownPath } from "../tree.js";
import { Composer } from "./composer.js";
import { Icon, Logo } from "./icons.js";
import { Message } from "./message.js";

const AT_ONCE = 40; // messages that are drawn; earlier ones when they are scrolled to

const SUGGESTIONS = [
  ["Explain", "why the sky is blue, in three sentences."],
  ["Write", "a Python function that finds the longest common prefix of a list of strings."],
  ["Compare", "TCP and UDP in a table."],
  ["Tell", "a very short story about a lighthouse that forgets its light."],
];

function Welcome({ model, onSend }) {
  return html`<div class="welcome">
    <${Logo} />
    <h1>What would you like to ask?</h1>
    <p class="help">${model ? html`<strong>${model}</strong> runs on this server. Nothing you write leaves it.` : "No model is offered here."}</p>
    <ul class="suggestions">${SUGGESTIONS.map(
      ([first, rest]) => html`<li><button type="button" onClick=${() => onSend(`${first} ${rest}`, [])}><strong>${first}</strong> ${rest}</button></li>`,
    )}</ul>
    <ul class="features">
      <li><${Icon} name="eye" /><span><strong>Look inside</strong> a reply: how sure the model was of each token, and what else it weighed.</span></li>
      <li><a href="#/compare"><${Icon} name="columns" /><span><strong>Side by side</strong>: one prompt under several strategies or models.</span></a></li>
      <li><a href="#/engine"><${Icon} name="pulse" /><span><strong>The engine</strong>: what it is doing, live.</span></a></li>
    </ul>
  </div>`;
}

/** Keeps the end in view while text arrives, unless the reader scrolled away from it. */
function useFollowing(frame, id, empty) {
  const following = useRef(true);
  const [away, setAway] = useState(false);
  const scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = frame.current;
    following.current = scrollHeight - scrollTop - clientHeight < 60;
    setAway(!following.current);
  };
  const toEnd = () => {
    following.current = true;
    setAway(false);
    frame.current.scrollTop = empty ? 0 : frame.current.scrollHeight;
  };
  useLayoutEffect(() => {
    if (following.current && !empty) frame.current.scrollTop = frame.current.scrollHeight;
  });
  useLayoutEffect(toEnd, [id]);
  return { away, scrolled, toEnd };
}

export function ConversationView() {
  const conversation = useSignal(chats.open);
  const replies = useSignal(running).keys();
  const inside = useSignal(chats.inside);
  const { problem } = useSignal(server);
  const [drawn, setDrawn] = useState(AT_ONCE);
  const frame = useRef(null);
  const { record, nodes } = conversation;
  const earlier = useRef(null);
  const path = shownPath(nodes, record.id);
  const { away, scrolled, toEnd } = useFollowing(frame, record.id, path.length === 0);
  const busy = new Set(replies);
  const writing = path.filter((node) => busy.has(node.id));
  const hidden = Math.max(path.length - drawn, 0);

  useEffect(() => setDrawn(AT_ONCE), [record.id]);
  useEffect(() => {
    if (!earlier.current) return undefined;
    const observer = new IntersectionObserver(([entry]) => entry.isIntersecting && showEarlier(), { root: frame.current, rootMargin: "400px" });
    observer.observe(earlier.current);
    return () => observer.disconnect();
  }, [record.id, drawn, hidden > 0]);

  const showEarlier = () => {
    const { scrollHeight, scrollTop } = frame.current;
    setDrawn((n) => n + AT_ONCE);
    requestAnimationFrame(() => {
      // Where the browser does not keep the place itself, as Safari.
      if (!CSS.supports("overflow-anchor", "auto")) frame.current.scrollTop = scrollTop + frame.current.scrollHeight - scrollHeight;
    });
  };
  const send = (content, attachments) => {
    toEnd();
    const last = path[path.length - 1];
    sendMessage(conversation, last?.id ?? record.id, attachments.length ? { content, attachments } : { content });
  };
  const editLast = () => {
    const last = path.findLast((node) => node.role === "user");
    const article = last && frame.current.querySelector(`[data-id="${last.id}"]`);
    article?.querySelector('[aria-label="Edit"]')?.click();
  };
  const known = path.findLast((node) => node.stats?.total)?.stats.total ?? 0;
  const used = known + (writing[0]?.live?.tokens ?? 0);
  return html`<main class="conversation" id="main">
    <div class="scroll" ref=${frame} onScroll=${scrolled}>
      ${path.length
        ? html`<div class="messages" aria-live="off">
            ${hidden > 0 && html`<button type="button" class="button small earlier" ref=${earlier} onClick=${showEarlier}>${hidden} earlier messages</button>`}
            ${path.slice(hidden).map(
              (node, i, shown) => html`<${Message} key=${node.id} conversation=${conversation} node=${node} parent=${nodes.get(node.parent)}
                busy=${busy.has(node.id)} inside=${inside.has(node.id)} last=${i === shown.length - 1} />`,
            )}
          </div>`
        : !problem && html`<${Welcome} model=${record.model} onSend=${send} />`}
    </div>
    <div class="composer-place">
      ${away && path.length > 0 && html`<button type="button" class="to-end" aria-label="To the end" title="To the end" onClick=${toEnd}><${Icon} name="down" /></button>`}
      <${Composer} draftKey=${record.id} busy=${writing.length > 0} onSend=${send} onStop=${() => writing.forEach((node) => stop(node.id))}
        onEditLast=${editLast} used=${used} context=${contextOf(record.model)} placeholder=${record.model ? `Message ${record.model}` : "Message"} />
    </div>
  </main>`;
}
