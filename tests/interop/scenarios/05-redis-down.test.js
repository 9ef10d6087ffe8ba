'use strict';
// Claim: a request in flight while Redis is stopped is answered within the request timeout, on sockets and on RabbitMQ,
// and the service recovers by itself.
// Provoked by: SIGSTOP (a hang: connections stay, nothing answers), and SIGKILL with a later, empty start.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { Client } = require('../lib/client.js');
const { scenario } = require('../lib/scenario.js');
const { until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const SILVER = 2;
const REQUEST_TIMEOUT_MS = 1000;
const ANSWER_MS = REQUEST_TIMEOUT_MS + 1000;

async function stand(stage) {
  await stage.events({ events: [
    { id: EVENT, categories: [{ id: GOLD, total: 100 }, { id: SILVER, total: 100 }] },
    { id: 2, categories: [{ id: 3, total: 10 }] },
  ] });
  const { a, b } = await stage.fleet({ SEATLOCK_REQUEST_TIMEOUT: `${REQUEST_TIMEOUT_MS}ms`, SEATLOCK_RATE_LIMIT: 'off' });
  const callers = [await stage.orders(11), await stage.orders(10)];
  const holder = await stage.client(a, 1, { name: 'holder' });
  const other = await stage.client(b, 2, { name: 'other', transport: 'websocket' });
  const watcher = await stage.client(b, 3, { name: 'watcher' });
  for (const client of [holder, other, watcher]) await client.join(EVENT);
  const grant = await holder.lock(EVENT, GOLD, 2);
  check.granted(grant, { eventId: EVENT, categoryId: GOLD, quantity: 2 });
  await watcher.update(GOLD, (u) => u.availableTickets === 98);
  return { a, b, callers, grant, holder, other, watcher };
}

/** Every request there is, at once; each must be answered in time. `allowed` says what an answer may be. */
async function allAtOnce({ callers, grant, holder, other }, round) {
  const sockets = [
    [holder, 'lock-tickets', { eventId: EVENT, categoryId: SILVER, quantity: 1, requestId: `h-${round}` }],
    [other, 'lock-tickets', { eventId: EVENT, categoryId: GOLD, quantity: 1, requestId: `o-${round}` }],
    [holder, 'get-my-locks', undefined],
    [other, 'get-my-locks', undefined],
    [holder, 'unlock-tickets', { eventId: EVENT, categoryId: SILVER }],
    [other, 'join-event-room', { eventId: 2 }],
  ];
  const patterns = [
    ['validate-user-locks', { userId: 1, eventId: EVENT, categoryId: GOLD, quantity: 2 }],
    ['confirm-ticket-lock', { lockId: grant.lockId }],
    ['confirm-lock', { lockId: grant.lockId, userId: 1 }],
    ['release-ticket-lock', { lockId: grant.lockId, userId: 99 }],
    ['get-user-locks', { userId: 1 }],
    ['get-lock', { lockId: grant.lockId }],
  ];
  const start = Date.now();
  const timed = async (what, promise) => {
    try {
      return { what, answer: await promise, took: Date.now() - start };
    } catch (error) {
      return { what, err: error.rpc, lost: error.rpc === undefined ? error.message : undefined, took: Date.now() - start };
    }
  };
  return Promise.all([
    ...sockets.map(([client, name, data], i) => timed(
      `${name} of ${client.name}`,
      i % 2 ? client.ask(name, data, 8000) : client.tell(name, data, 8000),
    )),
    ...callers.flatMap((caller) => patterns.map(([pattern, data]) => timed(`${pattern} of ${caller.name}`, caller.send(pattern, data, 8000)))),
  ]);
}

function unavailable(results) {
  for (const { what, answer, err, lost, took } of results) {
    assert.equal(lost, undefined, `${what}: ${lost}`);
    assert.ok(took <= ANSWER_MS, `${what} took ${took} ms`);
    if (answer !== undefined) check.refused(answer, 'unavailable');
    else {
      assert.equal(typeof err, 'object', `${what}: ${JSON.stringify(err)}`);
      assert.equal(typeof err.message, 'string', `${what}: ${JSON.stringify(err)}`);
    }
  }
}

scenario('redis hangs: every socket and every Nest caller is answered in time, and all goes on by itself', async (stage) => {
  const parts = await stand(stage);
  const { a, b, callers, grant, holder, other, watcher } = parts;
  stage.store.freeze();
  unavailable(await allAtOnce(parts, 1));
  const beat = await holder.ask('heartbeat', undefined, ANSWER_MS);
  assert.match(beat.timestamp, check.ISO);
  assert.equal((await a.http('/livez')).status, 200, 'liveness does not depend on Redis');
  await until(15_000, 'readiness goes down', async () => (await a.http('/readyz')).status === 503, 100);
  unavailable(await allAtOnce(parts, 2));
  // A newcomer is let in, because a refusal would keep its client away: it is answered like the others, and greeted
  // as soon as there is somebody who knows its locks.
  const newcomer = new Client(b, 60, { name: 'newcomer', transport: 'websocket' });
  stage.clients.push(newcomer);
  newcomer.socket.connect();
  await newcomer.next('(connect)');
  check.refused(await newcomer.lock(EVENT, GOLD, 1), 'unavailable');

  const from = watcher.mark();
  stage.store.thaw();
  await Promise.all([a.ready(), b.ready()]);
  assert.equal((await newcomer.next('connected', { within: 8000 })).success, true);
  assert.ok([holder, other, watcher].every((client) => client.socket.connected), 'sockets stayed');
  assert.deepEqual([holder, other, watcher].flatMap((client) => client.all('(disconnect)')), []);

  // What became of the requests without an answer is unknown; repeating them unchanged says it and does no harm.
  const again = await until(8000, 'the repeated request is granted', async () => {
    const answer = await other.lock(EVENT, GOLD, 1, { requestId: 'o-2' });
    return answer.success || answer.code === 'already_locked' ? answer : undefined;
  }, 200);
  const locks = (await other.ask('get-my-locks')).locks.filter(({ categoryId }) => categoryId === GOLD);
  assert.equal(locks.length, 1, JSON.stringify({ again, locks }));
  await watcher.update(GOLD, (u) => u.version > 0, { from, within: 8000, what: 'news after the outage' });
  for (const caller of callers) {
    const record = await caller.send('get-lock', { lockId: grant.lockId });
    assert.ok(['active', 'confirmed'].includes(record.status), JSON.stringify(record));
    assert.equal((await caller.send('get-user-locks', { userId: 2 })).length, 1);
  }
  check.ordered(watcher, GOLD);
}, { timeout: 75_000 });

scenario('redis is killed with requests in flight and comes back empty: answered in time, recovered by itself', async (stage) => {
  const parts = await stand(stage);
  const { a, b, callers, holder, watcher } = parts;
  const versionBefore = Math.max(...watcher.all('availability-update').map(({ version }) => version));

  const flying = allAtOnce(parts, 1);
  await stage.store.kill();
  for (const { what, err, lost, took } of await flying) {
    assert.equal(lost, undefined, `${what}: ${lost}`);
    assert.ok(took <= ANSWER_MS, `${what} took ${took} ms`);
    if (err !== undefined) assert.equal(typeof err.message, 'string', `${what}: ${JSON.stringify(err)}`);
  }
  unavailable(await allAtOnce(parts, 2));
  await until(15_000, 'readiness goes down', async () => (await b.http('/readyz')).status === 503, 100);

  await stage.store.restart();
  await Promise.all([a.ready(), b.ready()]);
  assert.ok(holder.socket.connected && watcher.socket.connected, 'sockets stayed');
  const fresh = await stage.client(a, 50, { name: 'fresh buyer' });
  const from = watcher.mark();
  const grant = await until(8000, 'tickets can be locked again', async () => {
    const answer = await fresh.lock(EVENT, SILVER, 3, { requestId: 'fresh' });
    return answer.success ? answer : undefined;
  }, 200);
  const news = await watcher.update(SILVER, (u) => u.lockedTickets >= 3, { from, within: 8000, what: 'the lock, on the other replica' });
  assert.ok(news.version > versionBefore, `version ${news.version} after ${versionBefore}`);
  check.ordered(watcher, SILVER);
  for (const caller of callers) {
    const found = await caller.send('validate-user-locks', { userId: 50, eventId: EVENT, categoryId: SILVER, quantity: 3 });
    assert.equal(found.valid, true, JSON.stringify(found));
    assert.equal(found.lockId, grant.lockId);
  }
  for (const caller of callers) {
    assert.equal(await caller.send('confirm-lock', { lockId: grant.lockId, userId: 50 }), true, caller.name);
  }
}, { timeout: 75_000 });
