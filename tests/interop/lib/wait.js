'use strict';
// Waiting for conditions, always with a bound. Nothing here sleeps for its own sake.

/** What is waited for will never be. */
class Hopeless extends Error {}

/** A promise's result, or an error that says what did not happen in time. */
async function within(ms, what, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not within ${ms} ms: ${what}`)), ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/**
 * Asks `probe` again and again until it gives something truthy, and returns that. What `probe` throws counts as "not yet"
 * and is quoted when the time is up; a `Hopeless` ends the wait at once.
 */
async function until(ms, what, probe, every = 25) {
  const end = Date.now() + ms;
  let last = 'it never held';
  for (;;) {
    const left = end - Date.now();
    if (left <= 0) throw new Error(`not within ${ms} ms: ${what} (${last})`);
    try {
      const found = await within(left, what, Promise.resolve(probe()));
      if (found) return found;
    } catch (error) {
      if (error instanceof Hopeless) throw error;
      last = error.message;
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(every, Math.max(1, end - Date.now()))));
  }
}

/** Runs `work` for every item, at most `limit` at a time. */
async function pool(items, limit, work) {
  const results = new Array(items.length);
  let next = 0;
  const lane = async () => {
    for (let i = next++; i < items.length; i = next++) results[i] = await work(items[i], i);
  };
  await Promise.all(Array.from({ length: Math.min(limit, items.length) }, lane));
  return results;
}

module.exports = { Hopeless, pool, until, within };
