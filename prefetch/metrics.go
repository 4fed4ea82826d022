package prefetch

import (
	"cmp"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	starts  *prometheus.CounterVec
	bytes   prometheus.Counter
	seconds prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		starts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_prefetch_starts_observed_total", Help: "Starts whose mapped files were read, by outcome.",
		}, []string{"outcome"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_bytes_total", Help: "Bytes that the kernel was asked to read ahead.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "hearth_prefetch_read_ahead_seconds", Help: "Time to ask for all of an image's profile.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 4, 9),
		}),
	}
	r = cmp.Or[prometheus.Registerer](r, prometheus.NewRegistry())
	for _, c := range []prometheus.Collector{m.starts, m.bytes, m.seconds} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) observed(err error) {
	outcome := "ok"
	if err != nil {
		outcome = "failed"
	}
	m.starts.WithLabelValues(outcome).Inc()
}
