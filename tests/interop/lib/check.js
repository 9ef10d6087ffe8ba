'use strict';
// What several scenarios claim in the same words.

const assert = require('node:assert/strict');

const ISO = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** What a promise was rejected with: the RPC `err` where there is one. */
async function failure(promise) {
  let value;
  try {
    value = await promise;
  } catch (error) {
    return error.rpc ?? error;
  }
  throw new Error(`this should have failed and gave ${JSON.stringify(value)}`);
}

/** The answer is a refusal with that code, and says something. */
function refused(answer, code, message) {
  assert.equal(answer.success, false, `a refusal was expected: ${JSON.stringify(answer)}`);
  assert.equal(answer.code, code, JSON.stringify(answer));
  assert.equal(typeof answer.message, 'string');
  assert.notEqual(answer.message, '');
  if (message !== undefined) assert.equal(answer.message, message);
}

/** A grant, whole. */
function granted(answer, { eventId, categoryId, quantity }) {
  assert.equal(answer.success, true, `a grant was expected: ${JSON.stringify(answer)}`);
  assert.match(answer.lockId, UUID);
  assert.match(answer.expiresAt, ISO);
  assert.match(answer.serverTime, ISO);
  assert.ok(Date.parse(answer.expiresAt) > Date.parse(answer.serverTime), JSON.stringify(answer));
  assert.equal(typeof answer.availableTickets, 'number');
  assert.deepEqual([answer.eventId, answer.categoryId, answer.quantity], [eventId, categoryId, quantity]);
}

/** A Lock as the contract has it. */
function lock(value, wanted) {
  assert.match(value.lockId, UUID);
  assert.match(value.createdAt, ISO);
  assert.match(value.expiresAt, ISO);
  for (const key of ['eventId', 'categoryId', 'quantity', 'userId']) assert.equal(typeof value[key], 'number', `${key} of ${JSON.stringify(value)}`);
  assert.ok(['active', 'confirmed', 'released', 'expired'].includes(value.status), JSON.stringify(value));
  for (const [key, expected] of Object.entries(wanted)) assert.equal(value[key], expected, `${key} of ${JSON.stringify(value)}`);
}

/** An Availability as the contract has it, with a status that follows from its counts. */
function availability(value, wanted = {}) {
  for (const key of ['eventId', 'categoryId', 'availableTickets', 'lockedTickets', 'totalTickets', 'version']) {
    assert.ok(Number.isSafeInteger(value[key]) && value[key] >= 0, `${key} of ${JSON.stringify(value)}`);
  }
  assert.match(value.timestamp, ISO);
  const status = value.availableTickets > 0 ? 'available' : value.lockedTickets > 0 ? 'temporarily-unavailable' : 'sold-out';
  assert.equal(value.status, status, JSON.stringify(value));
  for (const [key, expected] of Object.entries(wanted)) assert.equal(value[key], expected, `${key} of ${JSON.stringify(value)}`);
}

/** A client's updates of a category come in the order of their versions, and one version always says the same. */
function ordered(client, categoryId) {
  const last = {};
  for (const update of client.all('availability-update').filter((one) => one.categoryId === categoryId)) {
    availability(update);
    const counts = [update.availableTickets, update.lockedTickets, update.totalTickets].join();
    if (last.version !== undefined) {
      assert.ok(update.version >= last.version, `${client.name}: version ${update.version} after ${last.version}`);
      if (update.version === last.version) assert.equal(counts, last.counts, `${client.name}: version ${update.version} said two things`);
    }
    last.version = update.version;
    last.counts = counts;
  }
}

module.exports = { ISO, UUID, availability, failure, granted, lock, ordered, refused };
