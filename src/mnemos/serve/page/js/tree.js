// A conversation as a tree of messages. Every message knows its parent and its children, and which child is shown, so
// that an edit or another try is a new branch and nothing is lost. Pure functions of a Map from ids to messages, whose
// root has the conversation's id. A changed message is a new object, by which a view knows what to draw again.

export function newTree(root) {
  return new Map([[root, { id: root, parent: null, role: "root", children: [], selected: null }]]);
}

/** The messages that are shown, from the first to the last. */
export function shownPath(nodes, root) {
  const path = [];
  for (let node = nodes.get(nodes.get(root).selected); node; node = nodes.get(node.selected)) path.push(node);
  return path;
}

/** The messages from the first one to this one, whatever is shown. */
export function pathTo(nodes, id) {
  const path = [];
  for (let node = nodes.get(id); node && node.parent !== null; node = nodes.get(node.parent)) path.unshift(node);
  return path;
}

/** Adds a message below its parent and shows it. Returns the messages that changed. */
export function addNode(nodes, node) {
  const added = { children: [], selected: null, ...node };
  const parent = nodes.get(added.parent);
  const changed = { ...parent, children: [...parent.children, added.id], selected: added.id };
  nodes.set(parent.id, changed);
  nodes.set(added.id, added);
  return [changed, added];
}

/** Replaces fields of a message. */
export function changeNode(nodes, id, fields) {
  const changed = { ...nodes.get(id), ...fields };
  nodes.set(id, changed);
  return changed;
}

/** The message's place among its siblings, from 0, and their number. */
export function placeOf(nodes, node) {
  const { children } = nodes.get(node.parent);
  return { index: children.indexOf(node.id), count: children.length };
}

/** Shows the sibling that is `step` places further. Returns the changed parent. */
export function showSibling(nodes, id, step) {
  const parent = nodes.get(nodes.get(id).parent);
  const index = Math.min(Math.max(parent.children.indexOf(id) + step, 0), parent.children.length - 1);
  return changeNode(nodes, parent.id, { selected: parent.children[index] });
}

/** Makes a message, and all before it, shown. Returns the messages that changed. */
export function showNode(nodes, id) {
  const changed = [];
  for (let node = nodes.get(id); node.parent !== null; node = nodes.get(node.parent)) {
    if (nodes.get(node.parent).selected !== node.id) changed.push(changeNode(nodes, node.parent, { selected: node.id }));
  }
  return changed;
}

/** Removes a message and everything after it. Returns the changed parent and the removed ids. */
export function removeNode(nodes, id) {
  const parent = nodes.get(nodes.get(id).parent);
  const removed = [id];
  for (let i = 0; i < removed.length; i++) removed.push(...nodes.get(removed[i]).children);
  const index = parent.children.indexOf(id);
  const children = parent.children.filter((child) => child !== id);
  const selected = parent.selected === id ? (children[Math.min(index, children.length - 1)] ?? null) : parent.selected;
  const changed = changeNode(nodes, parent.id, { children, selected });
  for (const gone of removed) nodes.delete(gone);
  return { changed, removed };
}
