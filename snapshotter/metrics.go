package snapshotter

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/hearth-serverless/hearth/layer"
)

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
	encodings      *prometheus.CounterVec
	siblingFaults  *prometheus.CounterVec
	jobsRunning    prometheus.Gauge
	layersBytes    prometheus.Gauge
	phaseSeconds   *prometheus.HistogramVec
	phaseBytes     *prometheus.CounterVec
	layers         *prometheus.CounterVec
	pullSeconds    *prometheus.HistogramVec
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
		encodings: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_layers_fetched_total", Help: "Layers that were fetched, by form: original, or a sibling's encoding.",
		}, []string{"form"}),
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
		phaseSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_snapshotter_phase_seconds",
			Help:    "Time that a phase was busy: resolve once an image, the others once a layer. Phases overlap.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2.5, 14),
		}, []string{"phase"}),
		phaseBytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_phase_bytes_total",
			Help: "Bytes of layers, by phase: fetch and digest count the blob, write what it takes on disk.",
		}, []string{"phase"}),
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_snapshotter_layers_total",
			Help: "Layers of pulls that ended, by where they came from: fetched, shared, present, left, failed or given_up.",
		}, []string{"source"}),
		pullSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hearth_snapshotter_pull_seconds",
			Help:    "From the first question for an image to its last layer, by result: remote, fallback, error or given_up.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2.5, 14),
		}, []string{"result"}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{
		m.prepares, m.prepareSeconds, m.fallbacks, m.encodings, m.siblingFaults, m.jobsRunning, m.layersBytes,
		m.phaseSeconds, m.phaseBytes, m.layers, m.pullSeconds,
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) phase(name string, d time.Duration) {
	m.phaseSeconds.WithLabelValues(name).Observe(d.Seconds())
}

// job counts a layer that was fetched, also if it came to nothing.
func (m *metrics) job(j *job) {
	m.phase(phaseWait, j.queued[1].Sub(j.queued[0]))
	m.phaseBytes.WithLabelValues(phaseFetch).Add(float64(j.fetched.Load()))
	if j.result == nil {
		return
	}
	t := j.result.Timings
	for name, stage := range map[string]layer.Stage{
		phaseFetch: t.Fetch, "digest": t.Digest, phaseDecompress: t.Decompress, "diffid": t.DiffID, "tar": t.Tar, "write": t.Write,
	} {
		m.phase(name, stage.Busy)
	}
	m.phase(phaseSync, j.synced[1].Sub(j.synced[0]))
	m.phaseBytes.WithLabelValues("digest").Add(float64(j.result.CompressedBytes))
	m.phaseBytes.WithLabelValues("write").Add(float64(j.result.Bytes))
}

// pulled counts a pull that ended.
func (m *metrics) pulled(s *summary) {
	m.pullSeconds.WithLabelValues(s.result()).Observe(s.duration.Seconds())
	for source, n := range s.states {
		m.layers.WithLabelValues(source).Add(float64(n))
	}
}
