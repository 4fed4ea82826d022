package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// DefaultDomain is the domain below which every Function has a host name. Names under localhost need no DNS.
const DefaultDomain = "hearth.localhost"

const (
	defaultConcurrency = 10
	defaultMax         = 10
	defaultQueue       = 1000
	defaultTimeout     = 60 * time.Second

	firstWordTime  = 2 * time.Second  // for poolmanager to tell of its functions, before requests are taken
	headerTime     = 10 * time.Second // for a client to send a request's header
	idleTime       = 2 * time.Minute  // of a client's connection
	maxHeaderBytes = 64 << 10
)

// Pool is what the gateway asks of poolmanager. Its errors carry connect codes. Safe for concurrent use.
type Pool interface {
	// Allocate claims one Instance and returns when it serves. Asking again with the same id is the same claim.
	Allocate(ctx context.Context, req *hearthv1.AllocateRequest) (*hearthv1.AllocateResponse, error)
	// Watch calls event for every message, one after the other, until the stream or ctx ends, and says why it ended.
	Watch(ctx context.Context, subscriber string, event func(*hearthv1.WatchResponse)) error
	// Report delivers measured load.
	Report(ctx context.Context, req *hearthv1.ReportRequest) error
	// Release gives back an Instance that is not well: it is drained, discarded and replaced.
	Release(ctx context.Context, req *hearthv1.ReleaseRequest) error
}

// Config says what a Gateway works with. Pool and Name must be set; every zero value has a default.
type Config struct {
	// Name is this gateway's among those that watch the same poolmanager; drains wait for the acknowledgement of each.
	Name string
	// Domain: the Function hello answers to hello.DOMAIN. Default DefaultDomain.
	Domain string
	Pool   Pool
	// Dial connects to an Instance; default is TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// DialTime bounds one attempt to connect to an Instance; default 1.5 s: one packet may be lost, and a node that has vanished is given
	// up in time to have its Functions elsewhere within 5 s.
	DialTime time.Duration
	// Patience is how long an activation asks again while poolmanager or its nodes are unavailable, which is how a restart of
	// theirs looks from here; default 3 s. Requests wait meanwhile. Negative is no patience.
	Patience time.Duration
	// ActivationTime is the least deadline of a claim; a Function with a longer time-out has a longer one. It may outlast the
	// requests that wait for it: the next ones then find the Instance. Default 60 s.
	ActivationTime time.Duration
	// DrainTime bounds the end of requests in flight when Run is told to stop; default 25 s.
	DrainTime  time.Duration
	Logger     *slog.Logger
	Registerer prometheus.Registerer
}

// withDefaults returns a complete copy, or what is wrong.
func (c Config) withDefaults() (Config, error) {
	if c.Pool == nil {
		return c, errors.New("gateway: Config.Pool is not set")
	}
	if c.Name == "" {
		return c, errors.New("gateway: Config.Name is empty: drains need to know who acknowledges")
	}
	c.Domain = strings.ToLower(strings.Trim(orDefault(c.Domain, DefaultDomain), "."))
	for label := range strings.SplitSeq(c.Domain, ".") {
		if !isLabel(label) {
			return c, fmt.Errorf("gateway: domain %q: %q is no DNS label", c.Domain, label)
		}
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	c.DialTime = orDefault(c.DialTime, 1500*time.Millisecond)
	c.Patience = orDefault(c.Patience, 3*time.Second)
	c.ActivationTime = orDefault(c.ActivationTime, 60*time.Second)
	c.DrainTime = orDefault(c.DrainTime, 25*time.Second)
	c.Logger = orDefault(c.Logger, slog.New(slog.DiscardHandler))
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	return c, nil
}

func orDefault[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

// limits are the parts of a FunctionSpec that the gateway obeys, with defaults filled in.
type limits struct {
	concurrency, max, queue int
	timeout                 time.Duration
}

func limitsOf(spec *hearthv1.FunctionSpec) limits {
	l := limits{
		concurrency: defaultConcurrency, max: defaultMax, queue: defaultQueue, timeout: defaultTimeout,
	}
	s := spec.GetScaling()
	if n := int(s.GetConcurrency()); n > 0 {
		l.concurrency = n
	}
	if n := int(s.GetMax()); n > 0 {
		l.max = n
	}
	if n := int(s.GetQueue()); n > 0 {
		l.queue = n
	}
	if d := spec.GetTimeout().AsDuration(); d > 0 {
		l.timeout = d
	}
	return l
}
