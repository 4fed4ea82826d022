package layer

import (
	"context"
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of all layers of an Unpacker.
type metrics struct {
	layers *prometheus.CounterVec
	bytes  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		layers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_layer_unpacks_total", Help: "Layers by how their unpacking ended: ok, corrupt, cancelled or error.",
		}, []string{"outcome"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_layer_bytes_total", Help: "Bytes of the layers that were unpacked: of the blobs (compressed) and on disk (unpacked).",
		}, []string{"kind"}),
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.layers, m.bytes} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) done(res *Result, err error) {
	switch {
	case err == nil:
		m.layers.WithLabelValues("ok").Inc()
	case errors.Is(err, ErrCorrupt):
		m.layers.WithLabelValues("corrupt").Inc()
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		m.layers.WithLabelValues("cancelled").Inc()
	default:
		m.layers.WithLabelValues("error").Inc()
	}
	if res == nil {
		return
	}
	m.bytes.WithLabelValues("compressed").Add(float64(res.CompressedBytes))
	m.bytes.WithLabelValues("unpacked").Add(float64(res.Bytes))
}
