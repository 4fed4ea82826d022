package gateway

import (
	"errors"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the gateway's. The label function takes only names that poolmanager has told of, and "" for requests to
// anything else; the series of a deleted Function go with it.
type metrics struct {
	requests    *prometheus.CounterVec
	duration    *prometheus.HistogramVec
	queue       *prometheus.HistogramVec
	activations *prometheus.HistogramVec
	inFlight    *prometheus.GaugeVec
	connected   prometheus.Gauge
	failures    *prometheus.CounterVec
	releases    *prometheus.CounterVec
	retries     prometheus.Counter
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	fast := prometheus.ExponentialBucketsRange(0.0005, 60, 18)
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_gateway_requests_total", Help: "Requests answered, by status code; 499 is a client that left."}, []string{"function", "code"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_gateway_request_seconds", Help: "From a request's arrival to the end of its answer.", Buckets: fast}, []string{"function"}),
		queue: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_gateway_queue_seconds", Help: "Time in the queue, of requests that had to wait.", Buckets: fast}, []string{"function"}),
		activations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_gateway_activation_seconds", Help: "Allocate calls, by outcome.", Buckets: fast}, []string{"function", "outcome"}),
		inFlight: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hearth_gateway_in_flight", Help: "Requests here now, in the queue or at an instance."}, []string{"function"}),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_gateway_pool_connected", Help: "1 while poolmanager's events come in, 0 while the last known ones are used."}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_gateway_instance_failures_total", Help: "Requests that an instance failed without an answer: refused, reset, late."}, []string{"failure"}),
		releases: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_gateway_instances_released_total", Help: "Instances given back as unhealthy, by their last failure."}, []string{"failure"}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_gateway_retries_total", Help: "Requests that went to another instance because the first one failed."}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.queue, m.activations, m.inFlight, m.connected, m.failures, m.releases, m.retries} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

// functionMetrics are one Function's, looked up once.
type functionMetrics struct {
	of       *metrics
	name     string
	duration prometheus.Observer
	queue    prometheus.Observer
	inFlight prometheus.Gauge

	mu    sync.RWMutex // guards ended, and holds it as it is while a series is looked up
	ended bool         // the Function is deleted: make no series anew
}

func (m *metrics) function(name string) *functionMetrics {
	return &functionMetrics{
		of: m, name: name, duration: m.duration.WithLabelValues(name),
		queue: m.queue.WithLabelValues(name), inFlight: m.inFlight.WithLabelValues(name),
	}
}

func (f *functionMetrics) request(code int, took time.Duration) {
	f.duration.Observe(took.Seconds())
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.ended {
		f.of.requests.WithLabelValues(f.name, strconv.Itoa(code)).Inc()
	}
}

func (f *functionMetrics) activation(took time.Duration, err error) {
	outcome := "ok"
	if err != nil {
		outcome = connect.CodeOf(err).String()
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.ended {
		f.of.activations.WithLabelValues(f.name, outcome).Observe(took.Seconds())
	}
}

func (f *functionMetrics) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	labels := prometheus.Labels{"function": f.name}
	f.of.requests.DeletePartialMatch(labels)
	f.of.duration.DeletePartialMatch(labels)
	f.of.queue.DeletePartialMatch(labels)
	f.of.activations.DeletePartialMatch(labels)
	f.of.inFlight.DeletePartialMatch(labels)
}
