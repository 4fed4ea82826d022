package prefetch

import (
	"cmp"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	recordings *prometheus.CounterVec
	lost       prometheus.Counter
	hits       prometheus.Counter
	ahead      prometheus.Counter
	used       prometheus.Counter
	inVain     prometheus.Counter
	seconds    prometheus.Histogram
	kept       prometheus.Gauge
}

// Outcomes of a recording.
const (
	outcomeLearned = "learned"
	outcomeNothing = "nothing" // none of what was read is of a layer
	outcomeStart   = "start"   // the start failed
	outcomeTracer  = "tracer"  // the tracer did
	outcomeStore   = "store"   // the profile could not be written
)

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		recordings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_prefetch_recordings_total", Help: "Starts that were recorded, by outcome: learned, nothing, or what failed (start, tracer, store).",
		}, []string{"outcome"}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_lost_events_total", Help: "Events that the tracer lost in recorded starts.",
		}),
		hits: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_hit_bytes_total", Help: "Bytes of profiles that were in memory already when a start began.",
		}),
		ahead: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_ahead_bytes_total", Help: "Bytes that were read ahead of starts.",
		}),
		used: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_used_bytes_total", Help: "Bytes read ahead of recorded starts that these starts have needed.",
		}),
		inVain: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "hearth_prefetch_vain_bytes_total", Help: "Bytes read ahead of recorded starts that these starts have not needed.",
		}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "hearth_prefetch_replay_seconds", Help: "Time to read a start's profile ahead, or to find that it is in memory.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10),
		}),
		kept: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_prefetch_kept_bytes", Help: "Bytes kept in memory because several images of the node need them.",
		}),
	}
	r = cmp.Or[prometheus.Registerer](r, prometheus.NewRegistry())
	var errs []error
	for _, c := range []prometheus.Collector{m.recordings, m.lost, m.hits, m.ahead, m.used, m.inVain, m.seconds, m.kept} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}
