package gateway

import "net/url"

// Route is what the fuzz test sees of a route.
type Route struct {
	Host, Name, Prefix string
	ByHost             bool
}

// ParseRoute is parseRoute, with the path as it is forwarded.
func ParseRoute(host string, u *url.URL, domain string) (Route, *url.URL) {
	r := parseRoute(host, u.EscapedPath(), domain)
	out := *u
	r.strip(&out)
	return Route{r.host, r.name, r.prefix, r.byHost}, &out
}

// FormatTiming and IsLabel are tested by themselves.
var (
	FormatTiming = formatTiming
	IsLabel      = isLabel
)

// Acked is the version that the gateway acknowledges.
func (g *Gateway) Acked() int64 { return g.table.ack() }

// Queued is how many requests wait for a Function.
func (g *Gateway) Queued(name string) int {
	g.table.mu.RLock()
	defer g.table.mu.RUnlock()
	f := g.table.functions[name]
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waiting.Len()
}
