package instance

import (
	"errors"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

// metrics of the engine. Labels are outcomes, phases and states, of which there are few.
type metrics struct {
	activations *prometheus.CounterVec
	phases      *prometheus.HistogramVec
	instances   *prometheus.GaugeVec
	prepared    prometheus.Gauge
	freezes     *prometheus.CounterVec
	thaws       *prometheus.CounterVec
	thawSeconds prometheus.Histogram
	evictions   *prometheus.CounterVec
	frozenBytes prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		activations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_instance_activations_total", Help: "Activations that have ended, by outcome.",
		}, []string{"outcome"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_instance_phase_seconds", Help: "Duration of the phases of successful activations.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"phase"}),
		instances: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hearth_instance_instances", Help: "Instances on the node, by state.",
		}, []string{"state"}),
		prepared: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_instance_prepared_snapshots", Help: "Snapshots that wait for an activation.",
		}),
		freezes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_instance_freezes_total", Help: "Attempts to freeze an instance, by outcome.",
		}, []string{"outcome"}),
		thaws: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_instance_thaws_total", Help: "Activations of frozen instances, by outcome.",
		}, []string{"outcome"}),
		thawSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "hearth_instance_thaw_seconds", Help: "Time in which the freezer has let an instance's processes go on.",
			Buckets: prometheus.ExponentialBuckets(0.00002, 2, 16),
		}),
		evictions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "hearth_instance_evictions_total", Help: "Frozen instances given up, by the bound: count, bytes, or the node's memory pressure.",
		}, []string{"reason"}),
		frozenBytes: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "hearth_instance_frozen_bytes", Help: "Memory that the frozen instances used when they were frozen.",
		}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.activations, m.phases, m.instances, m.prepared, m.freezes, m.thaws, m.thawSeconds, m.evictions, m.frozenBytes,
	} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

// moved counts an Instance from one state to another; unspecified is outside.
func (m *metrics) moved(from, to hearthv1.State) {
	if from != hearthv1.State_STATE_UNSPECIFIED {
		m.instances.WithLabelValues(stateName(from)).Dec()
	}
	if to != hearthv1.State_STATE_GONE {
		m.instances.WithLabelValues(stateName(to)).Inc()
	}
}

func stateName(s hearthv1.State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

// activated counts the end of an activation; phases of images that anyone may name are not among its labels.
func (m *metrics) activated(outcome string, phases []*hearthv1.Phase) {
	m.activations.WithLabelValues(outcome).Inc()
	if outcome != outcomeServing {
		return
	}
	for _, p := range phases {
		switch p.Name {
		case phaseImage, phaseSnapshot, phaseCreate, phaseProcess, phaseThaw, phaseResume:
			m.phases.WithLabelValues(p.Name).Observe(time.Duration(p.Duration.AsDuration()).Seconds())
		}
	}
}
