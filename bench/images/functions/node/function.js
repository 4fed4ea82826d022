// The sample function in Node. It follows the contract that every sample keeps; see package images.
'use strict';

const http = require('node:http');

const routes = {
  '/': (query, request, response) => {
    response.setHeader('Content-Type', 'application/json');
    response.end(JSON.stringify({ runtime: 'node', version: process.version }) + '\n');
  },
  '/echo': (query, request, response) => {
    for (const name of ['content-type', 'content-length']) {
      if (request.headers[name]) response.setHeader(name, request.headers[name]);
    }
    request.pipe(response);
  },
  '/sleep': (query, request, response) => {
    const ms = query.get('ms') ?? '';
    if (!/^\d{1,9}$/.test(ms)) {
      response.statusCode = 400;
      response.end('ms must be a number of milliseconds\n');
      return;
    }
    const timer = setTimeout(() => response.end(ms + '\n'), Number(ms));
    response.on('close', () => clearTimeout(timer));
  },
  '/env': (query, request, response) => {
    response.setHeader('Content-Type', 'text/plain');
    response.end(process.env[query.get('name') ?? ''] ?? '');
  },
  '/log': (query, request, response) => {
    console.log(query.get('line') ?? '');
    response.statusCode = 204;
    response.end();
  },
};

let stopping = false;

const server = http.createServer((request, response) => {
  response.on('close', () => {
    if (stopping) setImmediate(() => server.closeIdleConnections());
  });
  let url;
  try {
    url = new URL(request.url, 'http://function');
  } catch {
    response.statusCode = 400;
    response.end();
    return;
  }
  const route = Object.hasOwn(routes, url.pathname) ? routes[url.pathname] : null;
  if (!route) {
    response.statusCode = 404;
    response.end();
    return;
  }
  route(url.searchParams, request, response);
});

server.keepAliveTimeout = 0; // who keeps a connection to us decides for how long
const port = Number(process.env.PORT || 8080);
server.listen(port, () => console.log(`function: node listening on port ${port}`));

// Requests under way end, idle connections are closed, then nothing is left to do and the process ends.
for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => {
    stopping = true;
    server.close();
    server.closeIdleConnections();
  });
}
