// Stands in for @google-cloud/functions-framework: Functions register themselves by name, and the loader finds them here.
'use strict';

const registered = new Map();

function register(signature) {
  return (name, handler) => {
    registered.set(name, { signature, handler });
  };
}

module.exports = { http: register('http'), cloudEvent: register('cloudevent'), registered };
