package pool

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

type metrics struct {
	allocations, claims, made, discards, drains, freezes, prepares *prometheus.CounterVec
	allocateTime, decideTime, drainTime                            prometheus.Histogram
	slow                                                           prometheus.Counter
}

// newMetrics registers nowhere when r is nil.
func newMetrics(r prometheus.Registerer, m *Manager) *metrics {
	f := promauto.With(r)
	counters := func(name, help string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"result"})
	}
	if r != nil {
		r.MustRegister(stockCollector{m})
	}
	return &metrics{
		allocations: counters("hearth_pool_allocations_total", "Allocations that ended, by result."),
		claims:      counters("hearth_pool_claims_total", "Claims that nodes answered, by result; an allocation may need several."),
		made:        counters("hearth_pool_instances_made_total", "Warm instances made, by result."),
		discards:    counters("hearth_pool_discards_total", "Calls that discard an instance, by result."),
		drains:      counters("hearth_pool_drains_total", "Drains that ended: drained, or timeout with requests in flight."),
		freezes:     counters("hearth_pool_freezes_total", "Instances that were to be frozen because they were not needed, by result."),
		prepares:    counters("hearth_pool_prepares_total", "Images made present on a node ahead of use, by result."),
		allocateTime: f.NewHistogram(prometheus.HistogramOpts{Name: "hearth_pool_allocate_seconds",
			Help: "From an allocation's arrival to an instance that serves.", Buckets: prometheus.ExponentialBuckets(0.005, 2, 14)}),
		decideTime: f.NewHistogram(prometheus.HistogramOpts{Name: "hearth_pool_decide_seconds",
			Help: "From an allocation's arrival to the call that claims an instance for it, where there was one at once.", Buckets: prometheus.ExponentialBuckets(0.000125, 2, 12)}),
		drainTime: f.NewHistogram(prometheus.HistogramOpts{Name: "hearth_pool_drain_seconds",
			Help: "From the decision to drain an instance to its discard.", Buckets: prometheus.ExponentialBuckets(0.01, 3, 10)}),
		slow: f.NewCounter(prometheus.CounterOpts{Name: "hearth_pool_slow_subscribers_total", Help: "Subscribers sent away because they fell behind."}),
	}
}

// stockCollector reads what there is when it is asked.
type stockCollector struct{ m *Manager }

func (stockCollector) descs() (instances, warm, queue, epoch, nodes, subscribers *prometheus.Desc) {
	return prometheus.NewDesc("hearth_pool_instances", "Instances on all nodes, by state.", []string{"state"}, nil),
		prometheus.NewDesc("hearth_pool_warm", "Instances that can be claimed, by degree, and runtime if one is booted in them.", []string{"degree", "runtime"}, nil),
		prometheus.NewDesc("hearth_pool_queue", "Allocations that wait for an instance.", nil, nil),
		prometheus.NewDesc("hearth_pool_epoch", "Number of this poolmanager's term.", nil, nil),
		prometheus.NewDesc("hearth_pool_nodes", "Nodes that are connected.", nil, nil),
		prometheus.NewDesc("hearth_pool_subscribers", "Gateways that take part in drains.", nil, nil)
}

// Describe is prometheus.Collector's.
func (c stockCollector) Describe(out chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, out) }

// Collect is prometheus.Collector's.
func (c stockCollector) Collect(out chan<- prometheus.Metric) {
	instances, warm, queue, epoch, nodes, subscribers := c.descs()
	states := map[string]float64{"warm": 0, "claimed": 0, "serving": 0, "frozen": 0, "draining": 0, "creating": 0}
	c.m.mu.Lock()
	for _, i := range c.m.instances {
		switch {
		case i.state == hearthv1.State_STATE_GONE:
		case i.leaving():
			states["draining"]++
		case i.by != nil || i.state == hearthv1.State_STATE_CLAIMED:
			states["claimed"]++
		case i.state == hearthv1.State_STATE_WARM:
			states["warm"]++
		case i.state == hearthv1.State_STATE_SERVING:
			states["serving"]++
		case i.state == hearthv1.State_STATE_FROZEN:
			states["frozen"]++
		default:
			states["creating"]++
		}
	}
	degrees := c.m.degrees()
	waiting, up, subs := len(c.m.queue), c.m.up, len(c.m.subscribers)
	c.m.mu.Unlock()
	for state, n := range states {
		out <- prometheus.MustNewConstMetric(instances, prometheus.GaugeValue, n, state)
	}
	for k, n := range degrees {
		out <- prometheus.MustNewConstMetric(warm, prometheus.GaugeValue, n, k[0], k[1])
	}
	for desc, n := range map[*prometheus.Desc]int{queue: waiting, nodes: up, subscribers: subs} {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n))
	}
	out <- prometheus.MustNewConstMetric(epoch, prometheus.GaugeValue, float64(c.m.epoch))
}

// degrees counts what can be claimed, by degree and Runtime. Guarded by mu.
func (m *Manager) degrees() map[[2]string]float64 {
	out := map[[2]string]float64{{"sandbox", ""}: 0}
	for _, r := range m.runtimes {
		if r.current != nil {
			out[[2]string{"runtime", r.name}] = 0
		}
	}
	for k, nodes := range m.index.spare {
		for _, all := range nodes {
			if k.runtime == "" {
				out[[2]string{"sandbox", ""}] += float64(len(all))
			} else if m.current(k) {
				out[[2]string{"runtime", k.runtime}] += float64(len(all))
			}
		}
	}
	for i := range m.index.frozen {
		if i.asleep() {
			out[[2]string{"revision", i.kind.runtime}]++
		}
	}
	return out
}
