package gateway

import (
	"net"
	"net/url"
	"strings"
)

// pathPrefix leads to a Function on any host that is none of a Function's own.
const pathPrefix = "/fn/"

// route is where a request is to go, as far as its host and path alone say.
type route struct {
	host   string // normalised; to be looked up among the hosts that Functions name themselves
	name   string // Function by its name, or empty
	prefix string // of the path, to be taken off: "" or "/fn/NAME"
	byHost bool   // name comes from the host
}

// parseRoute reads a route from the Host header and the escaped path. It never fails: a route without a name and with an
// unknown host leads nowhere.
func parseRoute(host, escapedPath, domain string) route {
	r := route{host: normalHost(host)}
	if label, ok := strings.CutSuffix(r.host, "."+domain); ok && isLabel(label) {
		r.name, r.byHost = label, true
		return r
	}
	rest, ok := strings.CutPrefix(escapedPath, pathPrefix)
	if !ok {
		return r
	}
	if name, _, _ := strings.Cut(rest, "/"); isLabel(name) {
		r.name, r.prefix = name, pathPrefix+name
	}
	return r
}

// strip takes the route's prefix off a URL's path, which keeps whatever escapes it had.
func (r route) strip(u *url.URL) {
	if u.Path == "" {
		u.Path = "/"
	}
	if r.prefix == "" {
		return
	}
	raw := strings.TrimPrefix(u.EscapedPath(), r.prefix)
	if raw == "" {
		raw = "/"
	}
	path, err := url.PathUnescape(raw)
	if err != nil { // cannot be: the whole was well escaped
		path = raw
	}
	u.Path, u.RawPath = path, raw
}

// normalHost takes port, letter case and a trailing dot off a Host header.
func normalHost(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// isLabel says whether s is a DNS label in lower case, which every Function's name is.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// mayHost says whether a Function may name the host as its own: not what the gateway itself is reached by.
func mayHost(host, domain string) bool {
	if host == "" || host == "localhost" || host == domain || net.ParseIP(strings.Trim(host, "[]")) != nil {
		return false
	}
	label, under := strings.CutSuffix(host, "."+domain)
	return !under || !isLabel(label)
}
