package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	crd "github.com/hearth-serverless/hearth/api/crd/v1alpha1"
)

const poolLong = `A pool keeps instances warm on nodes, before any function is known: of a runtime, booted, or sandboxes, in which any image can be started.
On a cluster pools are WarmPools, as many as there are kinds of nodes, and where several cover a node they add up. On a single machine each
runtime has one of its name, and "hearth up --pool-size" says how many sandboxes there are.`

func (a *app) poolCommands() *cobra.Command {
	c := &cobra.Command{
		Use: "pool", Aliases: []string{"pools"}, Short: "Say how much is kept warm, and where", Long: poolLong, Args: subcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.listPools(), a.applyPool(), a.deletePool())
	return c
}

func (a *app) poolList(ctx context.Context) ([]crd.WarmPool, error) {
	d, err := a.deployment()
	if err != nil {
		return nil, err
	}
	list, err := d.Pools(ctx)
	if err != nil {
		return nil, a.explain(err, "list pools")
	}
	return list, nil
}

func (a *app) listPools() *cobra.Command {
	var out format
	c := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List pools: what is warm, and how much of it should be", Args: takes(0, 0, ""),
		Example: "  hearth pool ls\n  hearth pool ls -o json",
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := a.poolList(c.Context())
			if err != nil {
				return err
			}
			if out == formatJSON {
				return a.printJSON(list)
			}
			rows := [][]string{{"NAME", "RUNTIME", "PER NODE", "NODES", "WARM", "DESIRED", "HEADROOM", "ON", "PROBLEM"}}
			for i := range list {
				p := &list[i]
				rows = append(rows, []string{
					p.Name, dash(p.Spec.Runtime), fmt.Sprint(poolSize(p)), fmt.Sprint(p.Status.Nodes), fmt.Sprint(p.Status.Warm), fmt.Sprint(p.Status.Desired),
					fmt.Sprint(p.Spec.Headroom), dash(metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: p.Spec.NodeSelector})), problem(p.Status.Conditions),
				})
			}
			return a.table(rows)
		},
	}
	out.add(c.Flags())
	return c
}

func poolSize(p *crd.WarmPool) int32 {
	if p.Spec.Size == nil {
		return 0
	}
	return *p.Spec.Size
}

// problem is what a condition that does not hold says, in one line.
func problem(conditions []metav1.Condition) string {
	for _, c := range conditions {
		if c.Status == metav1.ConditionFalse {
			return firstLine(c.Reason + ": " + c.Message)
		}
	}
	return "-"
}

type poolOptions struct {
	runtime, memory, cpu string
	size, headroom       int32
	images               []string
	nodes                map[string]string
	out                  format
}

const applyPoolLong = `Creates a pool, or changes it: what is not said is as at first. With --runtime booted instances of it wait, and without sandboxes do.`

const applyPoolExample = `  hearth pool apply python --runtime python --size 4
  hearth pool apply sandboxes --size 3 --image registry.example/shop:7
  hearth pool apply big --runtime java --size 8 --nodes disk=ssd,pool=functions --headroom 4`

func (a *app) applyPool() *cobra.Command {
	o := &poolOptions{}
	c := &cobra.Command{
		Use: "apply NAME --size N", Short: "Create or change a pool", Long: applyPoolLong, Example: applyPoolExample,
		Args: takes(1, 1, "the pool's NAME"), ValidArgsFunction: a.completePool,
		RunE: func(c *cobra.Command, args []string) error {
			if !c.Flags().Changed("size") {
				return usagef("--size is missing: how many should wait on each node?")
			}
			pool, err := o.pool(args[0])
			if err != nil {
				return err
			}
			d, err := a.deployment()
			if err != nil {
				return err
			}
			applied, err := d.ApplyPool(c.Context(), pool)
			if err != nil {
				return a.explainPool(err, "apply pool "+args[0])
			}
			if o.out == formatJSON {
				return a.printJSON(applied)
			}
			return a.printf("pool %s is applied; see `%s`\n", args[0], a.named("hearth pool ls"))
		},
	}
	f := c.Flags()
	f.Int32Var(&o.size, "size", 0, "instances that wait on each node (required)")
	f.StringVar(&o.runtime, "runtime", "", "that is booted in them (default: none, they are sandboxes)")
	f.StringSliceVar(&o.images, "image", nil, "image to have on these nodes ahead; may be repeated")
	f.StringToStringVar(&o.nodes, "nodes", nil, "LABEL=VALUE of the nodes that it covers, separated by commas (default: all)")
	f.Int32Var(&o.headroom, "headroom", 0, "low-priority pods that keep room free for more, on all of these nodes together")
	f.StringVar(&o.memory, "memory", "", "that each which waits requests from its node, like 64Mi")
	f.StringVar(&o.cpu, "cpu", "", "that each which waits requests from its node, in cores, like 10m")
	_ = c.RegisterFlagCompletionFunc("runtime", a.completeRuntime)
	o.out.add(f)
	return c
}

func (o *poolOptions) pool(name string) (*crd.WarmPool, error) {
	pool := &crd.WarmPool{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       crd.WarmPoolSpec{Runtime: o.runtime, Size: &o.size, NodeSelector: o.nodes, Headroom: o.headroom},
	}
	for _, image := range o.images {
		pool.Spec.Images = append(pool.Spec.Images, crd.ImageReference(image))
	}
	memory, err := parseBytes(o.memory)
	if err != nil {
		return nil, usagef("--memory %q: %w", o.memory, err)
	}
	cpu, err := parseCores(o.cpu)
	if err != nil {
		return nil, usagef("--cpu %q: %w", o.cpu, err)
	}
	if memory > 0 {
		pool.Spec.Resources.Memory = resource.NewQuantity(memory, resource.BinarySI)
	}
	if cpu > 0 {
		pool.Spec.Resources.CPU = resource.NewMilliQuantity(cpu, resource.DecimalSI)
	}
	return pool, nil
}

func (a *app) deletePool() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME", Aliases: []string{"delete"}, Short: "Delete a pool and end what waits in it", Args: takes(1, 1, "the pool's NAME"),
		Example: "  hearth pool rm big", ValidArgsFunction: a.completePool,
		RunE: func(c *cobra.Command, args []string) error {
			d, err := a.deployment()
			if err != nil {
				return err
			}
			if err := d.DeletePool(c.Context(), args[0]); err != nil {
				return a.explainPool(err, "delete pool "+args[0])
			}
			a.note("Pool %s is deleted.", args[0])
			return nil
		},
	}
}

// completePool offers the names of pools.
func (a *app) completePool(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return complete(c, args, func(ctx context.Context) (names []string, _ error) {
		list, err := a.poolList(ctx)
		for i := range list {
			names = append(names, list[i].Name)
		}
		return names, err
	})
}

// explainPool is explain, with the advice that is about pools.
func (a *app) explainPool(err error, doing string) error {
	if text, ok := strings.CutSuffix(a.explain(err, doing).Error(), "; see `hearth list`"); ok {
		return &spoken{text: text + "; see `hearth pool ls`", err: err}
	}
	return a.explain(err, doing)
}
