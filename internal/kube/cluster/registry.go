package cluster

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// The ConfigMap of what users of the cluster need not say each time, in SystemNamespace.
const (
	configName  = "hearth"
	registryKey = "registry"
)

// Registry is where code is pushed to: HOST[:PORT][/PATH], as `hearth install --registry` has noted it, or empty.
func (c *Client) Registry(ctx context.Context) (string, error) {
	var config corev1.ConfigMap
	err := c.api.Get(ctx, client.ObjectKey{Namespace: SystemNamespace, Name: configName}, &config)
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	return config.Data[registryKey], c.coded(err)
}

func configMap(registry string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: SystemNamespace, Name: configName, Labels: map[string]string{nameLabel: daemonsName}},
		Data:       map[string]string{registryKey: registry},
	}
}
