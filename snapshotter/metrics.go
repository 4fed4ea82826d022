package snapshotter

import "github.com/prometheus/client_golang/prometheus"

// How a Prepare ended.
const (
	resultRemote   = "remote"   // we brought the layer, or had it
	resultFallback = "fallback" // containerd has to bring it
	resultError    = "error"
	resultPlain    = "plain" // not a layer, or labels that do not say which
)

type metrics struct {
	prepares       *prometheus.CounterVec
	prepareSeconds *prometheus.HistogramVec
	fallbacks      *prometheus.CounterVec
	layers         *prometheus.CounterVec
	siblingFaults  *prometheus.CounterVec
	jobsRunning    prometheus.Gauge
	layersBytes    prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		prepares: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_prepares_total", Help: "Snapshots prepared, by result: remote, fallback, error or plain.",
		}, []string{"result"}),
		prepareSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_snapshotter_prepare_seconds", Help: "How long a Prepare took.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 14),
		}, []string{"result"}),
		fallbacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_fallbacks_total", Help: "Layers that were left to containerd, by reason.",
		}, []string{"reason"}),
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_layers_total", Help: "Layers that were brought, by where from: original, or a sibling's encoding.",
		}, []string{"source"}),
		siblingFaults: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_sibling_faults_total",
			Help: "Siblings that could not be used, so that the original was: search, corrupt, not_found, unauthorized, stalled or other.",
		}, []string{"reason"}),
		jobsRunning: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_snapshotter_jobs_running", Help: "Layers being fetched and unpacked.",
		}),
		layersBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_snapshotter_layers_bytes", Help: "Disk space of the unpacked layers.",
		}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.prepares, m.prepareSeconds, m.fallbacks, m.layers, m.siblingFaults, m.jobsRunning, m.layersBytes} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}
