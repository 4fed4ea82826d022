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
	boots       *prometheus.HistogramVec
	loads       *prometheus.HistogramVec
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
		boots: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_instance_boot_seconds", Help: "Duration of Runtimes' boots, from the loader's execution until it is ready or has failed.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 14),
		}, []string{"runtime", "outcome"}),
		loads: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "hearth_instance_load_seconds", Help: "Duration of the loading of Functions' code in booted Runtimes, until it is loaded or has failed.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 16),
		}, []string{"runtime", "outcome"}),
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.activations, m.phases, m.instances, m.prepared, m.freezes, m.thaws, m.thawSeconds, m.evictions, m.frozenBytes, m.boots, m.loads,
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
		case phaseImage, phaseSnapshot, phaseTurn, phaseCreate, phaseProcess, phaseThaw, phaseResume, phaseBoot, phaseMount, phaseLoad:
			m.phases.WithLabelValues(p.Name).Observe(time.Duration(p.Duration.AsDuration()).Seconds())
		}
	}
}

// booted counts a boot. Runtimes are few: their names are the operator's.
func (m *metrics) booted(runtime string, took time.Duration, err error) {
	outcome := "ready"
	if err != nil {
		outcome = outcomeOf(err)
	}
	m.boots.WithLabelValues(runtime, outcome).Observe(took.Seconds())
}

// loaded counts a load. A Function's own fault is told from the loader's.
func (m *metrics) loaded(runtime string, took time.Duration, executing bool, err error) {
	outcome := "loaded"
	switch own := (*loadError)(nil); {
	case errors.As(err, &own):
		outcome = "refused"
	case err != nil:
		outcome = outcomeOf(err)
	case executing:
		outcome = "executing"
	}
	m.loads.WithLabelValues(runtime, outcome).Observe(took.Seconds())
}
