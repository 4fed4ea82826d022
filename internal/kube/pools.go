package kube

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/controller-runtime/pkg/client"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool"
)

// stocker is the pool.Manager that keeps what WarmPools ask for.
type stocker interface {
	SetWarmSets(sets []pool.WarmSet)
	SupplyErrors(runtime string) []string
	// Instance is nil if there is none of that id.
	Instance(id string) *hearthv1.Instance
}

// Pools knows the WarmPools, which nodes each covers, and whose the pods are that wait. It implements WarmPools. Safe for concurrent use.
type Pools struct {
	stock stocker

	mu    sync.Mutex // guards what follows; never held over I/O, nor over a call of stock, which calls back
	pools map[string]*crd.WarmPool
	nodes map[string]site
	// waits has the pods that wait, or were made to, with their pools, by node. Which of them still do, stock knows.
	waits map[string]map[string]string
	sets  sync.Mutex // keeps calls of stock in order; taken before mu
}

// site is what decides whether a WarmPool covers a node.
type site struct {
	labels map[string]string
	taints []corev1.Taint
}

func newPools(stock stocker) *Pools {
	return &Pools{stock: stock, pools: map[string]*crd.WarmPool{}, nodes: map[string]site{}, waits: map[string]map[string]string{}}
}

// SetPool implements WarmPools.
func (p *Pools) SetPool(w *crd.WarmPool) {
	p.change(func() bool {
		old := p.pools[w.Name]
		p.pools[w.Name] = w
		return old == nil || old.UID != w.UID || old.Generation != w.Generation
	})
}

// DeletePool implements WarmPools.
func (p *Pools) DeletePool(name string) {
	p.change(func() bool {
		was := p.pools[name] != nil
		delete(p.pools, name)
		return was
	})
}

func (p *Pools) change(what func() bool) {
	p.sets.Lock()
	defer p.sets.Unlock()
	p.mu.Lock()
	changed := what()
	sets := make([]pool.WarmSet, 0, len(p.pools))
	for _, name := range slices.Sorted(maps.Keys(p.pools)) {
		w := p.pools[name]
		sets = append(sets, pool.WarmSet{Runtime: w.Spec.Runtime, PerNode: int(w.Spec.Instances()), Images: fromWords[string](w.Spec.Images), Covers: func(node string, _ pool.NodeInfo) bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return covers(w, p.nodes[node])
		}})
	}
	p.mu.Unlock()
	if changed {
		p.stock.SetWarmSets(sets)
	}
}

// PoolNames implements WarmPools.
func (p *Pools) PoolNames() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.pools))
}

// PoolStatus implements WarmPools.
func (p *Pools) PoolStatus(name string) (PoolStatus, bool) {
	p.mu.Lock()
	w := p.pools[name]
	if w == nil {
		p.mu.Unlock()
		return PoolStatus{}, false
	}
	var s PoolStatus
	var waits []string
	for node, at := range p.nodes {
		if covers(w, at) {
			s.Nodes++
			for id, whose := range p.waits[node] {
				if whose == name {
					waits = append(waits, id)
				}
			}
		}
	}
	s.Desired = s.Nodes * int(w.Spec.Instances())
	p.mu.Unlock()
	for _, id := range waits {
		if p.stock.Instance(id).GetState() == hearthv1.State_STATE_WARM {
			s.Warm++
		}
	}
	if s.Warm < s.Desired {
		s.Error = strings.Join(p.stock.SupplyErrors(w.Spec.Runtime), "; ")
	}
	return s, true
}

// covers says whether a WarmPool's pods may be on a node: its labels are asked for, and its taints are tolerated.
func covers(w *crd.WarmPool, at site) bool {
	if !labels.SelectorFromSet(w.Spec.NodeSelector).Matches(labels.Set(at.labels)) {
		return false
	}
	for _, taint := range at.taints {
		if !tolerated(w.Spec.Tolerations, taint) {
			return false
		}
	}
	return true
}

func tolerated(tolerations []corev1.Toleration, taint corev1.Taint) bool {
	return taint.Effect == corev1.TaintEffectPreferNoSchedule || slices.ContainsFunc(tolerations, func(t corev1.Toleration) bool {
		return (t.Effect == "" || t.Effect == taint.Effect) && (t.Key == "" && t.Operator == corev1.TolerationOpExists ||
			t.Key == taint.Key && (t.Operator == corev1.TolerationOpExists || t.Value == taint.Value))
	})
}

// setNode takes in what a node is; the Manager is told of it afterwards.
func (p *Pools) setNode(name string, at site) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nodes[name] = at
}

func (p *Pools) removeNode(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.nodes, name)
	delete(p.waits, name)
}

// enter says which WarmPool an Instance that is made is for, and counts it: the one that lacks most on that node, or nil if somebody waits
// for it that no WarmPool foresaw. What was claimed waits no more, although its pod may not have been written yet.
func (p *Pools) enter(node, runtime, instance string) *crd.WarmPool {
	for _, id := range p.counted(node) {
		if p.stock.Instance(id).GetState() > hearthv1.State_STATE_WARM {
			p.leave(node, id)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	waits := map[string]int{}
	for _, whose := range p.waits[node] {
		waits[whose]++
	}
	var best *crd.WarmPool
	most := 0
	for _, w := range p.pools {
		if w.Spec.Runtime != runtime || !covers(w, p.nodes[node]) {
			continue
		}
		lacks := int(w.Spec.Instances()) - waits[w.Name]
		if lacks > 0 && (best == nil || cmp.Or(cmp.Compare(lacks, most), cmp.Compare(best.Name, w.Name)) > 0) {
			best, most = w, lacks
		}
	}
	if best != nil {
		p.count(best.Name, node, instance)
	}
	return best
}

// count notes a pod that waits for a pool. Guarded by mu.
func (p *Pools) count(name, node, instance string) {
	if p.waits[node] == nil {
		p.waits[node] = map[string]string{}
	}
	p.waits[node][instance] = name
}

// counted lists what was counted on a node.
func (p *Pools) counted(node string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Keys(p.waits[node]))
}

// leave forgets a pod that waits no more.
func (p *Pools) leave(node, instance string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if delete(p.waits[node], instance); len(p.waits[node]) == 0 {
		delete(p.waits, node)
	}
}

// waiting notes a pod of a pool.
func (p *Pools) waiting(name, node, instance string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count(name, node, instance)
}

// all lists the WarmPools. They must not be changed.
func (p *Pools) all() []*crd.WarmPool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Values(p.pools))
}

// load takes in the WarmPools that there are, so that a new term gives up nothing that they ask for.
func (p *Pools) load(ctx context.Context, api client.Reader, namespace string) error {
	var all crd.WarmPoolList
	if err := api.List(ctx, &all, client.InNamespace(namespace)); err != nil {
		return fmt.Errorf("list warm pools: %w", err)
	}
	for i := range all.Items {
		if all.Items[i].DeletionTimestamp == nil {
			p.SetPool(&all.Items[i])
		}
	}
	return nil
}
