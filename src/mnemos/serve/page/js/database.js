// What the browser keeps: conversations, their messages, and the tokens of messages (large, so read only when looked at).

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mnemos", 1);
    request.onupgradeneeded = () => {
      const database = request.result;
      database.createObjectStore("conversations", { keyPath: "id" });
      database.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
      database.createObjectStore("tokens", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function change(stores, work) {
  const transaction = (await open()).transaction(stores, "readwrite");
  work(...stores.map((name) => transaction.objectStore(name)));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

async function read(name, find) {
  const store = (await open()).transaction(name).objectStore(name);
  return result(find(store));
}

export const allConversations = () => read("conversations", (store) => store.getAll());
export const conversation = (id) => read("conversations", (store) => store.get(id));
export const messagesOf = (id) => read("messages", (store) => store.index("conversation").getAll(id));
export const allMessages = () => read("messages", (store) => store.getAll());
export const tokensOf = async (id) => (await read("tokens", (store) => store.get(id)))?.tokens ?? [];

export const saveConversation = (record) => change(["conversations"], (store) => store.put(record));

/** Saves messages, and a conversation's record where it is given. */
export function saveMessages(messages, record = null) {
  return change(["messages", "conversations"], (store, conversations) => {
    for (const message of messages) store.put(message);
    if (record) conversations.put(record);
  });
}

export const saveTokens = (id, tokens) => change(["tokens"], (store) => store.put({ id, tokens }));

export function deleteMessages(ids) {
  return change(["messages", "tokens"], (messages, tokens) => {
    for (const id of ids) {
      messages.delete(id);
      tokens.delete(id);
    }
  });
}

export async function deleteConversation(id) {
  const messages = await messagesOf(id);
  await change(["conversations"], (store) => store.delete(id));
  await deleteMessages(messages.map((message) => message.id));
}
