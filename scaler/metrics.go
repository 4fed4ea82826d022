package scaler

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

type metrics struct {
	decisions prometheus.Counter
	desired   *prometheus.GaugeVec // as many as there are Functions
	reports   *prometheus.CounterVec
	gateways  prometheus.Gauge
}

// newMetrics registers nowhere when r is nil.
func newMetrics(r prometheus.Registerer) *metrics {
	f := promauto.With(r)
	return &metrics{
		decisions: f.NewCounter(prometheus.CounterOpts{
			Name: "hearth_scaler_decisions_total", Help: "Decisions of how many instances a function should have.",
		}),
		desired: f.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hearth_scaler_desired_instances", Help: "Instances that a function should have.",
		}, []string{"function"}),
		reports: f.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_scaler_reports_total", Help: "Reports of gateways, by result.",
		}, []string{"result"}),
		gateways: f.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_scaler_gateways", Help: "Gateways that report load.",
		}),
	}
}
