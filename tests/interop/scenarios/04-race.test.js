'use strict';
// Claim: five hundred clients over two replicas race for the last ten tickets: ten grants, and an answer for everyone.
// Provoked by: five hundred users, each with a socket of his own in the room, asking in the same instant.

const assert = require('node:assert/strict');
const check = require('../lib/check.js');
const { scenario } = require('../lib/scenario.js');
const { pool, until } = require('../lib/wait.js');

const EVENT = 1;
const GOLD = 1;
const TOTAL = 1000;
const LEFT = 10;
const CLIENTS = 500;

scenario('race: 500 clients over two replicas, the last 10 tickets, exactly 10 grants', async (stage, t) => {
  await stage.events({ events: [{ id: EVENT, categories: [{ id: GOLD, total: TOTAL, reserved: TOTAL - LEFT }] }] });
  const { replicas } = await stage.fleet();
  const clients = await pool(Array.from({ length: CLIENTS }, (_, i) => i), 40, (i) =>
    stage.client(replicas[i % 2], 1000 + i, { name: 'racer', transport: 'websocket' }));
  await pool(clients, 100, async (client) => {
    const joined = await client.ask('join-event-room', { eventId: EVENT }, 10_000);
    assert.equal(joined.success, true, JSON.stringify(joined));
  });
  const { 'get-ticket-categories': asked } = await stage.stock.call('asked');
  assert.ok(asked <= 6, `the events-service was asked ${asked} times for one event`);

  const start = Date.now();
  const answers = await Promise.all(clients.map((client) =>
    client.ask('lock-tickets', { eventId: EVENT, categoryId: GOLD, quantity: 1 }, 20_000)));
  const took = Date.now() - start;
  const tally = {};
  for (const { code = 'granted' } of answers) tally[code] = (tally[code] ?? 0) + 1;
  t.diagnostic(`500 answers in ${took} ms: ${JSON.stringify(tally)}`);
  const grants = answers.filter((answer) => answer.success);
  assert.equal(grants.length, LEFT);
  assert.equal(new Set(grants.map(({ lockId }) => lockId)).size, LEFT);
  for (const answer of answers) {
    if (!answer.success) check.refused(answer, 'insufficient_tickets', 'Only 0 tickets available');
  }
  assert.ok(took < 10_000, `500 answers took ${took} ms`);

  const full = { availableTickets: 0, lockedTickets: LEFT, totalTickets: TOTAL, status: 'temporarily-unavailable' };
  await stage.agree(EVENT, GOLD, full);
  await until(10_000, 'all 500 saw the last ticket go', () => clients.every((client) => {
    const [last] = client.all('availability-update').slice(-1);
    return last?.availableTickets === 0 && last.lockedTickets === LEFT;
  }));
  for (const client of clients) check.ordered(client, GOLD);
  await until(5000, 'the fleet counts 500 users and 10 locks', async () => {
    const { json } = await replicas[0].http('/stats');
    if (json.connectedUsers !== CLIENTS || json.ticketLocks.activeLocks !== LEFT) throw new Error(JSON.stringify(json));
    return true;
  });
}, { timeout: 90_000 });
