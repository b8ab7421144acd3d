// Where the page begins.
import * as chats from "./chats.js";
import { html, render } from "./dom.js";
import { connect } from "./settings.js";
import { App, newConversation } from "./views/app.js";

const [, view, id] = location.hash.split("/");
await chats.start();
if (view !== "chat" || !(await chats.openConversation(id))) {
  const address = location.hash;
  newConversation();
  if (view !== "chat") history.replaceState(null, "", address || "#/");
}
render(html`<${App} />`, document.getElementById("app"));
connect();
