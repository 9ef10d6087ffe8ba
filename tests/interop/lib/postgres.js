'use strict';
// A PostgreSQL of one's own: a free port, files that are gone with it, no password on the loopback.

const { execFileSync, spawnSync } = require('node:child_process');
const fs = require('node:fs');
const os = require('node:os');
const path = require('node:path');
const { Process, freePort, removeFolder } = require('./process.js');
const { Hopeless, until } = require('./wait.js');

/** Debian keeps the programs of each version apart, off the path. */
function folder() {
  const root = '/usr/lib/postgresql';
  const versions = fs.existsSync(root) ? fs.readdirSync(root).sort((a, b) => Number(b) - Number(a)) : [];
  const found = versions.map((version) => path.join(root, version, 'bin')).find((bin) => fs.existsSync(path.join(bin, 'initdb')));
  return found ?? '';
}

/** PostgreSQL refuses to run as root: then it runs as the user that its package made, or as nobody. */
function unprivileged() {
  if (process.getuid() !== 0) return {};
  const id = (flag, user) => Number(execFileSync('id', [flag, user], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }));
  for (const user of ['postgres', 'nobody']) {
    try {
      return { uid: id('-u', user), gid: id('-g', user) };
    } catch {
      // No such user.
    }
  }
  throw new Error('neither the user postgres nor nobody exists, and PostgreSQL does not run as root');
}

class Postgres {
  static async start() {
    const postgres = new Postgres();
    const user = unprivileged();
    postgres.dir = fs.mkdtempSync(path.join(os.tmpdir(), 'seatlock-postgres-'));
    if (user.uid !== undefined) fs.chownSync(postgres.dir, user.uid, user.gid);
    postgres.port = await freePort();
    const data = path.join(postgres.dir, 'data');
    const env = { PATH: process.env.PATH, LANG: 'C.UTF-8' };
    const made = spawnSync(path.join(folder(), 'initdb'), [
      '-D', data, '-U', 'box_office', '-A', 'trust', '-E', 'UTF8', '--no-locale', '--no-sync',
    ], { ...user, env, cwd: postgres.dir, encoding: 'utf8' });
    if (made.status !== 0) throw new Error(`initdb: ${made.error?.message ?? made.stderr}`);
    postgres.process = new Process('postgres', path.join(folder(), 'postgres'), [
      '-D', data, '-p', String(postgres.port), '-k', postgres.dir, '-c', 'listen_addresses=127.0.0.1', '-c', 'fsync=off',
    ], { ...user, env, cwd: postgres.dir });
    await until(30_000, 'PostgreSQL answers', () => {
      if (!postgres.process.alive) throw new Hopeless(postgres.process.log.join('\n'));
      return postgres.query('select 1') === '1';
    }, 100);
    return postgres;
  }

  get url() {
    return `postgres://box_office@127.0.0.1:${this.port}/postgres`;
  }

  /** What psql prints: rows as lines, columns between bars. */
  query(sql) {
    const asked = spawnSync(path.join(folder(), 'psql'), [this.url, '-XAtq', '-v', 'ON_ERROR_STOP=1', '-c', sql], { encoding: 'utf8' });
    if (asked.status !== 0) throw new Error(`psql: ${asked.error?.message ?? asked.stderr}`);
    return asked.stdout.trim();
  }

  /** `kill -9` would leave its shared memory behind; SIGINT ends it at once and cleanly. */
  async stop() {
    if (this.process.alive) {
      this.process.signal('SIGINT');
      await this.process.ended;
    }
    removeFolder(this.dir);
  }
}

module.exports = { Postgres };
