'use strict';
// deploy/local/run as a child: started on free ports with the built binaries, stopped as Ctrl-C stops it.

const path = require('node:path');
const { Process, accepts, freePort } = require('../../interop/lib/process.js');
const { Hopeless, until, within } = require('../../interop/lib/wait.js');

const ROOT = path.join(__dirname, '..', '..', '..');
const BIN = path.dirname(process.env.SEATLOCK_BIN ?? path.join(ROOT, 'target', 'debug', 'seatlock'));
const PORTS = 10;

/** The first of ten free ports in a row. */
async function freePorts() {
  for (;;) {
    const first = await freePort();
    const taken = await Promise.all(Array.from({ length: PORTS }, (_, i) => accepts(first + i)));
    if (!taken.includes(true)) return first;
  }
}

class Stack {
  static async start() {
    const stack = new Stack();
    stack.port = await freePorts();
    stack.process = new Process('deploy/local/run', path.join(ROOT, 'deploy', 'local', 'run'), [], {
      env: {
        PATH: process.env.PATH,
        HOME: process.env.HOME,
        LOCAL_PORT: String(stack.port),
        LOCAL_BIN: BIN,
        LOCAL_PAYMENT: '600ms 0 0',
        // Short enough to be waited for, long enough for the page's warning at 20 s.
        SEATLOCK_LOCK_TTL: '30s',
      },
    });
    await until(180_000, 'the local stack runs', () => {
      if (!stack.process.alive) throw new Hopeless(stack.process.log.join('\n'));
      return stack.process.log.some((line) => line.includes('Ctrl-C stops everything'));
    }, 200);
    return stack;
  }

  get url() {
    return `http://localhost:${this.port}`;
  }

  get log() {
    return this.process.log;
  }

  /** `kill -9` of the replica that the script names. */
  killReplica() {
    const line = this.log.find((text) => text.includes('kill -9'));
    process.kill(Number(line.split('kill -9')[1]), 'SIGKILL');
  }

  /** Ctrl-C: the script ends by itself with 0, and nothing of it listens any more. */
  async stop() {
    if (!this.process.alive) throw new Error(`deploy/local/run ended by itself: ${this.log.slice(-20).join('\n')}`);
    this.process.signal('SIGINT');
    const { code } = await within(60_000, 'deploy/local/run ends', this.process.ended);
    if (code !== 0) throw new Error(`deploy/local/run ended with ${code}: ${this.log.slice(-20).join('\n')}`);
    for (let i = 0; i < PORTS; i++) {
      if (await accepts(this.port + i)) throw new Error(`something still listens on port ${this.port + i}`);
    }
  }
}

module.exports = { BIN, ROOT, Stack, freePort };
