// The loader of the node Runtime: boots Node and the modules that it is told, waits, loads one Function and serves it.
//
// docs/RUNTIMES.md is the contract. The control socket is descriptor 3: the image's entrypoint moves it there from 0. Requests go
// through Node's own HTTP server and Express, which the image has, to the Function.
'use strict';

const PROTOCOL = 1;
const CONTROL = 3;
const MAX_LINE = 1 << 20; // of the control protocol
const MAX_TRACE = 64 << 10;
const BODY_LIMIT = '1024mb'; // of what is parsed for the Function; the Functions Framework's

const fs = require('node:fs');
const http = require('node:http');
const https = require('node:https');
const Module = require('node:module');
const net = require('node:net');
const path = require('node:path');
const url = require('node:url');

const framework = require('./functions-framework.js');

function log(message) {
  process.stderr.write(`hearth: ${message}\n`);
}

// A Function may require the framework whether it brings it or not, and registers itself with ours.
const resolveFilename = Module._resolveFilename;
Module._resolveFilename = function (request, ...rest) {
  return request === '@google-cloud/functions-framework'
    ? require.resolve('./functions-framework.js')
    : resolveFilename.call(this, request, ...rest);
};

/** A request that cannot be taken for a CloudEvent. */
class NoEvent extends Error {}

/** The HTTP server that calls a Function with Express's request and response. */
function makeServer(handler, signature) {
  const express = require('express');
  const application = express();
  application.disable('x-powered-by');
  application.enable('trust proxy');
  const keep = { limit: BODY_LIMIT, verify: (request, _, body) => { request.rawBody = body; } };
  if (signature === 'cloudevent') {
    application.use(express.raw({ ...keep, type: () => true }));
    application.use(receiver(handler));
  } else {
    application.use(express.json(keep));
    application.use(express.text(keep));
    application.use(express.urlencoded({ ...keep, extended: true }));
    // What has another type is the Function's to read, as a stream or by req.rawBody in whole.
    application.use(express.raw({ ...keep, type: (request) => !streamed(request) }));
    application.use((request, response, next) => Promise.resolve(handler(request, response)).catch(next));
  }
  application.use((error, request, response, _next) => refuse(error, response));
  const server = http.createServer({ noDelay: true, keepAliveTimeout: 0, requestTimeout: 0 }, application);
  server.on('checkContinue', (request, response) => {
    response.writeContinue();
    server.emit('request', request, response);
  });
  return server;
}

/** Whether a body is left as a stream: one of unknown length may have no end. */
function streamed(request) {
  return request.headers['transfer-encoding'] !== undefined;
}

function refuse(error, response) {
  const status = error instanceof NoEvent ? 400 : error?.expose && error.status >= 400 && error.status < 500 ? error.status : 500;
  if (status === 500) log(`a request failed\n${describe(error)}`);
  if (response.headersSent) {
    response.destroy(); // so that nobody takes what was sent for the whole
    return;
  }
  response.status(status).type('text/plain').send(status === 500 ? 'Internal Server Error\n' : `${error.message}\n`);
}

/** Calls a Function of events; one that takes a second parameter is given a callback. */
function receiver(handler) {
  return (request, response, next) => {
    if (request.method !== 'POST') {
      response.status(405).set('Allow', 'POST').type('text/plain').send('a CloudEvent comes by POST\n');
      return;
    }
    let event;
    try {
      event = readEvent(request.headers, Buffer.isBuffer(request.body) ? request.body : Buffer.alloc(0));
    } catch (error) {
      next(error);
      return;
    }
    const called = new Promise((resolve, reject) => {
      if (handler.length < 2) resolve(handler(event));
      else handler(event, (error, result) => (error ? reject(error) : resolve(result)));
    });
    called.then(() => response.status(204).end(), (error) => next(error));
  };
}

/** The event of a request, in binary or structured mode. */
function readEvent(headers, body) {
  const type = headers['content-type'] ?? '';
  const media = type.split(';', 1)[0].trim().toLowerCase();
  let event = {};
  if (media === 'application/cloudevents+json') {
    event = parse(body);
    if (event === null || typeof event !== 'object' || Array.isArray(event)) throw new NoEvent('no CloudEvent: no JSON object');
    if (event.data_base64 !== undefined) {
      if (typeof event.data_base64 !== 'string' || !/^[A-Za-z0-9+/]*={0,2}$/.test(event.data_base64)) {
        throw new NoEvent('no CloudEvent: data_base64 is none');
      }
      event.data = Buffer.from(event.data_base64, 'base64');
      delete event.data_base64;
    }
  } else {
    for (const [name, value] of Object.entries(headers)) {
      if (name.startsWith('ce-')) event[name.slice(3)] = decode(value);
    }
    if (type) event.datacontenttype = type;
    if (body.length > 0) event.data = /[/+]json$/.test(media) ? parse(body) : media.startsWith('text/') ? body.toString() : body;
  }
  for (const name of ['specversion', 'id', 'source', 'type']) {
    if (typeof event[name] !== 'string' || event[name] === '') throw new NoEvent(`no CloudEvent: attribute ${name} is missing`);
  }
  if (!['1.0', '0.3'].includes(event.specversion)) throw new NoEvent('no CloudEvent: its specversion is not known');
  return event;
}

function parse(body) {
  try {
    return JSON.parse(body.toString());
  } catch (error) {
    throw new NoEvent(`no CloudEvent: ${error.message}`);
  }
}

function decode(value) {
  try {
    return decodeURIComponent(value);
  } catch {
    return value;
  }
}

function describe(error) {
  return String(error?.stack ?? error).slice(0, MAX_TRACE);
}

/** Finds the Function: MODULE.FUNCTION, or FUNCTION of the package's main module, or nothing, for that module's own. */
async function importFunction(code, handler, signature) {
  const dot = handler.lastIndexOf('.');
  const name = handler.slice(dot + 1);
  const exported = await importModule(code, dot < 0 ? null : handler.slice(0, dot));
  const own = exported?.default !== undefined && exported[name] === undefined ? exported.default : exported;
  const candidates = name === '' ? [own, own?.main] : [own?.[name], framework.registered.get(name)?.handler];
  const found = candidates.find((candidate) => typeof candidate === 'function');
  if (!found) {
    const wanted = name === '' ? 'no function' : `no function ${JSON.stringify(name)}`;
    throw new TypeError(`the module exports ${wanted}, which the handler ${JSON.stringify(handler)} names; it exports: ${Object.keys(own ?? {}).join(', ') || 'nothing'}`);
  }
  const registration = framework.registered.get(name);
  if (registration?.handler === found && registration.signature !== signature) {
    throw new TypeError(`${JSON.stringify(name)} is registered for ${registration.signature}, but its signature is ${signature}`);
  }
  return found;
}

async function importModule(code, name) {
  const inside = Module.createRequire(path.join(code, 'index.js'));
  const file = inside.resolve(name === null ? code : path.join(code, name));
  try {
    return inside(file);
  } catch (error) {
    if (error?.code !== 'ERR_REQUIRE_ESM') throw error;
    return import(url.pathToFileURL(file).href);
  }
}

/** One Function at most, and what nodeagent asks about it. */
class Loader {
  constructor(preloaded, missing) {
    this.preloaded = preloaded;
    this.missing = missing;
    this.server = null;
    this.loading = null; // the connection that asked for it
  }

  ready() {
    return {
      ready: {
        protocol: PROTOCOL, runtime: `node ${process.versions.node}`, loaded: this.server !== null,
        prompt: true, // what is on the socket comes before what comes later, in one loop of events
        preloaded: this.preloaded, missing: this.missing,
      },
    };
  }

  async answer(message, connection) {
    if (isObject(message.load) && this.server === null && this.loading === null) {
      const request = checked(message.load);
      this.loading = connection;
      try {
        return await this.load(request);
      } finally {
        this.loading = null;
      }
    }
    if (isObject(message.thawed)) {
      dropIdle();
      return { resumed: {} };
    }
    throw new Malformed('neither load, once, nor thawed');
  }

  async load({ code, handler, signature, address, env }) {
    const phases = {};
    let begun = process.hrtime.bigint();
    const phase = (name) => {
      const now = process.hrtime.bigint();
      phases[name] = Number(now - begun) / 1e9;
      begun = now;
    };
    Object.assign(process.env, env); // TZ among it: Node reads it anew
    if (signature !== 'http' && signature !== 'cloudevent') throw new TypeError(`signature ${JSON.stringify(signature)}: want http or cloudevent`);
    process.chdir(code);
    const server = makeServer(await importFunction(code, handler, signature), signature);
    phase('import');
    await listen(server, address);
    phase('listen');
    this.server = server;
    return { loaded: { phases } };
  }

  /** Requests under way end, idle connections are closed, then the process ends. */
  drain() {
    if (this.server === null) process.exit(0);
    this.server.on('request', (_, response) => response.on('close', () => setImmediate(() => this.server.closeIdleConnections())));
    this.server.close(() => process.exit(0));
    this.server.closeIdleConnections();
  }
}

function listen(server, address) {
  const colon = address.lastIndexOf(':');
  return new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen({ host: address.slice(0, colon).replace(/^\[|\]$/g, ''), port: Number(address.slice(colon + 1)), backlog: 1024 }, () => {
      server.off('error', reject);
      resolve();
    });
  });
}

/** Closes connections to others that waited, frozen, to be used again: whoever is at the other end has given them up. */
function dropIdle() {
  for (const agent of [http.globalAgent, https.globalAgent]) {
    for (const sockets of Object.values(agent.freeSockets)) {
      for (const socket of sockets) socket.destroy();
    }
  }
}

/** What came over the control socket is not of the protocol. */
class Malformed extends Error {}

function isObject(value) {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function checked(load) {
  const { code, handler = '', signature = 'http', address, env = {} } = load;
  for (const [name, value] of Object.entries({ code, handler, signature, address })) {
    if (typeof value !== 'string') throw new Malformed(`${name} is no text`);
  }
  if (!isObject(env) || Object.values(env).some((value) => typeof value !== 'string')) throw new Malformed('env is no map of strings');
  return { code, handler, signature: signature || 'http', address, env };
}

/** Speaks with nodeagent until the connection ends. */
async function converse(connection, loader) {
  connection.write(JSON.stringify(loader.ready()) + '\n');
  let parts = [], waiting = 0;
  for await (const block of connection) {
    let rest = block;
    for (let end; (end = rest.indexOf(10)) >= 0; rest = rest.subarray(end + 1)) {
      if (waiting + end > MAX_LINE) throw new Malformed('a line of over 1 MiB');
      const line = Buffer.concat([...parts, rest.subarray(0, end)]).toString();
      parts = [];
      waiting = 0;
      await respond(line, connection, loader);
    }
    parts.push(rest);
    waiting += rest.length;
    if (waiting > MAX_LINE) throw new Malformed('a line of over 1 MiB');
  }
}

async function respond(line, connection, loader) {
  let message;
  try {
    message = JSON.parse(line);
  } catch (error) {
    throw new Malformed(`no JSON: ${error.message}`);
  }
  if (!isObject(message)) throw new Malformed('no JSON object');
  try {
    connection.write(JSON.stringify(await loader.answer(message, connection)) + '\n');
  } catch (error) {
    if (error instanceof Malformed) throw error;
    fail(connection, error);
  }
}

/** Tells why a Function could not be loaded, at once: the process ends. */
function fail(connection, error) {
  const told = error instanceof Error ? `${error.name}: ${error.message.split('\n', 1)[0]}` : String(error);
  const line = JSON.stringify({ failed: { error: told.slice(0, MAX_TRACE), trace: describe(error) } }) + '\n';
  try {
    fs.writeSync(connection._handle.fd, line); // what is only queued would be lost with the process
  } catch {
    // nodeagent is gone
  }
  process.exitCode = 1;
  process.reallyExit(1);
}

function preload(names) {
  const preloaded = [], missing = {};
  for (const name of names.split(',').map((each) => each.trim()).filter(Boolean)) {
    try {
      require(name);
      preloaded.push(name);
    } catch (error) {
      missing[name] = String(error?.message ?? error).split('\n', 1)[0];
    }
  }
  return { preloaded, missing };
}

/** Loads a Function and sends requests through the whole server, so that a user's first one finds everything compiled and set up. */
async function warmUp() {
  const server = makeServer(await importFunction(__dirname, 'warm.hello', 'http'), 'http');
  await listen(server, '127.0.0.1:0');
  const agent = new http.Agent({ keepAlive: true });
  const request = (method, body) => new Promise((resolve, reject) => {
    const headers = body ? { 'Content-Type': 'application/json', 'Content-Length': body.length } : {};
    const sent = http.request({ port: server.address().port, host: '127.0.0.1', agent, method, path: '/warm?a=b', headers }, (response) => {
      response.resume().on('end', resolve).on('error', reject);
    });
    sent.on('error', reject).end(body);
  });
  for (let n = 0; n < 50; n++) {
    await request('GET');
    await request('POST', '{"a":1}');
  }
  agent.destroy();
  await new Promise((resolve) => server.close(resolve));
}

async function main() {
  let loader = null;
  process.on('SIGTERM', () => (loader === null ? process.exit(0) : loader.drain()));
  const { preloaded, missing } = preload(process.env.HEARTH_PRELOAD ?? '');
  await warmUp().catch((error) => log(`not warmed up: ${error.message}`)); // it serves as well, only later
  loader = new Loader(preloaded, missing);

  // A Function that ends the process while it is loaded, or throws where nobody waits for it, is told as any other failure.
  process.on('exit', (status) => {
    if (loader.loading) fail(loader.loading, new Error(`process.exit(${status}) was called while the Function was loaded`));
  });
  process.on('uncaughtExceptionMonitor', (error) => {
    if (loader.loading) fail(loader.loading, error);
  });

  let turn = Promise.resolve(); // one connection at a time
  const control = net.createServer((connection) => {
    connection.on('error', () => {}); // it ends then, which is what counts
    turn = turn.then(() => converse(connection, loader)).catch((error) => {
      if (error instanceof Malformed) log(`control: ${error.message}`);
    }).finally(() => connection.destroy());
  });
  control.listen({ fd: CONTROL });
}

main();
