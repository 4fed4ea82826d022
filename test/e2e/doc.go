// Package e2e judges a whole Hearth on a cluster by what others say of it: a Prometheus that has scraped it, and the API server's
// audit log. Its functions are for tests on a running cluster; its own tests need none.
package e2e
