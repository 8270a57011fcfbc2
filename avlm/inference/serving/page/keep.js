// The conversation outlives the page: it lies in this browser's own store until it is cleared.

const NAME = "avlm";
const STORE = "conversation";
const ONLY = "only";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function within(mode, work) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** @returns {Promise<object[]>} the turns that were kept; none where the browser keeps nothing */
export async function kept() {
  const turns = (await within("readonly", (store) => store.get(ONLY)).catch(() => [])) ?? [];
  return turns.map((turn) => (turn.role === "assistant" && !turn.finish ? { ...turn, finish: "stopped" } : turn));
}

let before = Promise.resolve();

/** What is given last is what stays. @returns {Promise<boolean>} whether the browser kept them */
export function keep(turns) {
  before = before.then(() => put(turns));
  return before;
}

async function put(turns) {
  const plain = turns.map(({ fault, ...turn }) => (fault ? { ...turn, fault: { title: fault.title, detail: fault.detail, status: fault.status } } : turn));
  try {
    await within("readwrite", (store) => store.put(plain, ONLY));
    return true;
  } catch {
    return false;
  }
}
