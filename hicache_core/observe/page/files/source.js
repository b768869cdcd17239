// The source of all data: this server, asked for JSON, with an API key if it requires one.

const KEY = "hicache-key", TIMEOUT_MS = 8000;

export async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!response.ok) throw Object.assign(new Error(`${path}: HTTP ${response.status}`), { status: response.status });
  return response.json();
}

// As ask(), but null for a path that this server does not have.
export async function askIfThere(path) {
  try {
    return await ask(path);
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}
