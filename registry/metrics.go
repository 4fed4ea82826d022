package registry

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests *prometheus.CounterVec
	retries  *prometheus.CounterVec
	inFlight prometheus.Gauge

	ranges, throttles, skipped, redirects, hedgedBytes prometheus.Counter
	hedges                                             *prometheus.CounterVec

	came             atomic.Int64 // body bytes
	awaited, starved *stretches   // at least one range of a blob is awaited; at least one reader has nothing to read
}

func newMetrics(reg prometheus.Registerer, b *budget) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		ranges:    counter("hearth_registry_ranges_total", "Parts of blobs that were fetched, whatever it took."),
		throttles: counter("hearth_registry_throttles_total", "Answers of registries that have too much to do."),
		skipped: counter("hearth_registry_hosts_skipped_total",
			"Mirrors that were left out because they could not be reached or were busy shortly before."),
		redirects: counter("hearth_registry_redirects_reused_total",
			"Requests that went to a remembered place of a blob without asking the registry."),
		hedgedBytes: counter("hearth_registry_hedged_bytes_total",
			"Bytes fetched by requests that were made because another for the same bytes was late."),
		hedges: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_registry_hedges_total",
			Help: "Requests that were made because another for the same bytes was late, by whether they ended first.",
		}, []string{"result"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_registry_requests_total",
			Help: "Requests to registries by outcome of their headers.",
		}, []string{"outcome"}),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_registry_retries_total",
			Help: "Attempts that were repeated on the same host, by reason.",
		}, []string{"reason"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_registry_requests_in_flight",
			Help: "Requests whose body is not read to its end yet.",
		}),
	}
	buffered := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "hearth_registry_buffer_bytes",
		Help: "Memory of range buffers in use.",
	}, func() float64 { return float64(b.bytesInUse()) })
	m.awaited, m.starved = &stretches{came: &m.came}, &stretches{came: &m.came}
	if reg == nil {
		return m, nil
	}
	sum := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value)
	}
	for _, c := range []prometheus.Collector{
		sum("hearth_registry_fetched_bytes_total", "Body bytes read from registries, bytes that were read twice included.",
			func() float64 { return float64(m.came.Load()) }),
		sum("hearth_registry_fetching_seconds_total",
			"Time in which at least one part of a blob was awaited from a registry. Waiting for memory is not in it.", m.awaited.seconds),
		sum("hearth_registry_starved_seconds_total",
			"Time in which at least one blob's reader had nothing to go on with: registry or link are the bound, not the unpacking.", m.starved.seconds),
		sum("hearth_registry_starved_bytes_total", "Body bytes that came in the time in which a reader had nothing to go on with.", m.starved.bytes),
		buffered, m.requests, m.retries, m.inFlight, m.ranges, m.throttles, m.skipped, m.redirects, m.hedgedBytes, m.hedges,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// outcome is the label of a request that ended with resp or err.
func outcome(resp *http.Response, err error) string {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "canceled"
	case err != nil:
		return "transport_error"
	case resp.StatusCode < 300:
		return "ok"
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		return "unauthorized"
	case resp.StatusCode == http.StatusNotFound:
		return "not_found"
	case resp.StatusCode == http.StatusTooManyRequests:
		return "throttled"
	case resp.StatusCode >= 500:
		return "server_error"
	}
	return "client_error"
}

// retryReason is the label of an attempt that is repeated because of err.
func retryReason(err error) string {
	var se *StatusError
	var ne net.Error
	switch {
	case errors.As(err, &se) && se.Code == http.StatusTooManyRequests:
		return "throttled"
	case errors.As(err, &se) && se.redirected:
		return "redirect"
	case errors.As(err, &se):
		return "status"
	case errors.Is(err, errStalled), errors.As(err, &ne) && ne.Timeout():
		return "stalled"
	}
	return "transport"
}
