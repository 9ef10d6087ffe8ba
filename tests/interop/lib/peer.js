'use strict';
// The runner's end of a Nest application: a process of its own, driven over Node's IPC channel.

const path = require('node:path');
const { Process } = require('./process.js');
const { within } = require('./wait.js');

class Peer {
  /**
   * @param {'events-service'|'orders-service'|'guide-orders-service'} program
   * @param {10|11} major which NestJS it runs on
   * @param {object} settings handed to the program
   */
  static async start(program, major, settings) {
    const peer = new Peer();
    peer.name = `${program} (Nest ${major})`;
    peer.waiting = new Map();
    peer.lastId = 0;
    peer.process = new Process(peer.name, process.execPath, [path.join(__dirname, '..', 'peers', `${program}.js`)], {
      env: { PATH: process.env.PATH, HOME: process.env.HOME, NEST_MAJOR: String(major), SETTINGS: JSON.stringify(settings), NO_COLOR: '1' },
      ipc: true,
    });
    const ready = new Promise((resolve) => {
      peer.process.child.on('message', (message) => {
        if (message.ready) resolve();
        const call = peer.waiting.get(message.id);
        if (!call) return;
        peer.waiting.delete(message.id);
        if ('failure' in message) call.reject(Object.assign(new Error(describe(message.failure)), { rpc: message.failure }));
        else call.resolve(message.value);
      });
    });
    const ended = peer.process.ended.then((exit) => {
      const error = new Error(`${peer.name} ended (${JSON.stringify(exit)}): ${peer.process.log.slice(-10).join('\n')}`);
      for (const call of peer.waiting.values()) call.reject(error);
      peer.waiting.clear();
      throw error;
    });
    ended.catch(() => {});
    await within(20_000, `${peer.name} is up: ${program}`, Promise.race([ready, ended]));
    return peer;
  }

  /** Runs one operation of the peer. What its own callers would catch is in the error's `rpc`. */
  call(op, args = {}, ms = 10_000) {
    const id = ++this.lastId;
    const answer = new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
    if (!this.process.alive) return Promise.reject(new Error(`${this.name} has ended`));
    this.process.child.send({ id, op, args });
    return within(ms, `${this.name} answers ${op} ${JSON.stringify(args)}`, answer);
  }

  /** `firstValueFrom(client.send(pattern, data))` in the peer. */
  send(pattern, data, ms) {
    return this.call('send', { pattern, data }, ms);
  }

  /** `client.emit(pattern, data)` in the peer. */
  emit(pattern, data) {
    return this.call('emit', { pattern, data });
  }

  async stop() {
    if (this.process.alive) await this.process.kill();
  }
}

function describe(failure) {
  return typeof failure === 'string' ? failure : JSON.stringify(failure);
}

module.exports = { Peer };
